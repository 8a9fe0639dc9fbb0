"""Formats of keys and tokens of services: pattern of the prefix, and pattern of the rest."""

from __future__ import annotations

_W = "[A-Za-z0-9_-]"
_HEX = "[0-9a-f]"
UUID = f"{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}"

# (prefix, rest), with the service as a comment.
FORMS = (
    ("(?:AKIA|ASIA|ABIA|ACCA)", "[0-9A-Z]{16}"),  # AWS
    ("AIza", f"{_W}{{35}}"),  # Google Cloud
    ("GOCSPX-", f"{_W}{{28}}"),
    (r"ya29\.", f"{_W}{{20,500}}"),
    ("1//0", f"{_W}{{35,120}}"),
    ("gh[opusr]_", "[A-Za-z0-9]{36,255}"),  # GitHub
    ("github_pat_", "[A-Za-z0-9_]{60,90}"),
    ("gl(?:pat|dt|rt|ptt|soat|ft|imt|agent|cbt|ffct|oas)-", rf"{_W}{{20,64}}(?:\.[0-9a-z]{{2}}\.[0-9a-z]{{9}})?"),
    ("AT(?:BB|ATT3|CTT3)", "[A-Za-z0-9_=-]{24,250}"),  # Atlassian
    ("sk-(?:proj|svcacct|admin|ant|or|lf)-", f"{_W}{{20,250}}"),  # OpenAI, Anthropic, OpenRouter
    ("sk-", f"{_W}{{20,200}}"),  # and DeepSeek, Moonshot, DashScope
    ("hf_", "[A-Za-z0-9]{30,40}"),  # Hugging Face
    ("gsk_", "[A-Za-z0-9]{40,60}"),  # Groq
    ("xai-", "[A-Za-z0-9]{60,100}"),
    ("r8_", "[A-Za-z0-9]{37}"),  # Replicate
    ("pplx-", "[A-Za-z0-9]{40,60}"),  # Perplexity
    ("nvapi-", f"{_W}{{50,80}}"),  # NVIDIA
    ("lsv2_(?:pt|sk)_", f"{_HEX}{{32}}_{_HEX}{{10}}"),  # LangSmith
    ("pcsk_", "[A-Za-z0-9_]{40,80}"),  # Pinecone
    ("dapi", f"{_HEX}{{32}}(?:-[0-9])?"),  # Databricks
    ("(?:SK|AC)", f"{_HEX}{{32}}"),  # Twilio
    ("[MNO]", rf"[A-Za-z0-9_-]{{22,28}}\.{_W}{{6}}\.{_W}{{27,40}}"),  # Discord
    ("mfa\\.", f"{_W}{{80,90}}"),
    (r"(?:xoxe\.)?xox[abeoprs]-", "[0-9A-Za-z-]{20,250}"),  # Slack
    ("xapp-", "[0-9A-Za-z-]{40,250}"),
    ("[sr]k_(?:live|test)_", "[0-9A-Za-z]{20,150}"),  # Stripe
    ("whsec_", "[A-Za-z0-9+/]{24,64}={0,2}"),
    ("sq0(?:atp|csp|idp)-", f"{_W}{{22,50}}"),  # Square
    ("shp(?:at|ca|pa|ss)_", "[0-9a-fA-F]{32}"),  # Shopify
    ("npm_", "[A-Za-z0-9]{36}"),
    ("pypi-", f"{_W}{{60,250}}"),
    ("rubygems_", f"{_HEX}{{48}}"),
    ("oy2", "[a-z0-9]{43}"),  # NuGet
    ("dckr_(?:pat|oat)_", f"{_W}{{24,40}}"),  # Docker
    (r"SG\.", rf"{_W}{{16,32}}\.{_W}{{16,64}}"),  # SendGrid
    ("key-", f"{_HEX}{{32}}"),  # Mailgun
    ("", f"{_HEX}{{32}}-{_HEX}{{8}}-{_HEX}{{8}}"),
    ("", f"{_HEX}{{32}}-us[0-9]{{1,2}}"),  # Mailchimp
    ("xkeysib-", f"{_HEX}{{64}}-[A-Za-z0-9]{{16}}"),  # Brevo
    ("(?:bot)?", "[0-9]{8,10}:[A-Za-z0-9_-]{35}"),  # Telegram
    ("do[opr]_v1_", f"{_HEX}{{64}}"),  # DigitalOcean
    ("HRKU-", f"(?:{UUID}|{_W}{{40,64}})"),  # Heroku
    (r"v1\.0-", f"{_HEX}{{24}}-{_HEX}{{140,160}}"),  # Cloudflare
    ("cf(?:ut|at|k)_", f"{_W}{{36,60}}"),
    ("LTAI", "[0-9A-Za-z]{12,26}"),  # Alibaba Cloud
    ("AKID", "[0-9A-Za-z]{32}"),  # Tencent Cloud
    ("AKLT", f"{_W}{{20,60}}"),  # Volcengine
    ("bce-v3/ALTAK-", f"[A-Za-z0-9]{{21}}/{_HEX}{{40}}"),  # Baidu
    ("ALTAK-?", "[A-Za-z0-9]{21}"),
    ("", rf"{_HEX}{{32}}\.[A-Za-z0-9]{{16}}"),  # Zhipu
    (r"[A-Za-z0-9_~.]{3}[0-9]Q~", "[A-Za-z0-9_~.-]{31,34}"),  # Azure, client secret
    ("lin_(?:api|oauth)_", "[A-Za-z0-9]{32,64}"),  # Linear
    ("ntn_", "[A-Za-z0-9]{40,50}"),  # Notion
    ("secret_", "[A-Za-z0-9]{43}"),
    ("fig[dur]_", f"{_W}{{36,50}}"),  # Figma
    ("pat[A-Za-z0-9]{14}\\.", f"{_HEX}{{64}}"),  # Airtable
    ("gl(?:c|sa)_", "[A-Za-z0-9_+/=]{32,200}"),  # Grafana
    ("NR(?:AK|II|JS)-", "[A-Za-z0-9_-]{20,42}"),  # New Relic
    ("sntrys_", "[A-Za-z0-9_+/=]{40,250}"),  # Sentry
    (r"hv[sbr]\.", f"{_W}{{24,200}}"),  # Vault
    (r"[A-Za-z0-9]{14}\.atlasv1\.", f"{_W}{{60,70}}"),  # Terraform
    (r"dp\.(?:pt|st|ct|sa)\.", rf"(?:{_W}{{2,35}}\.)?[A-Za-z0-9]{{40,44}}"),  # Doppler
    ("AGE-SECRET-KEY-1", "[0-9A-Z]{58}"),
    ("(?:sbp|pscale_tkn|nfp|vcp|vercel)_", f"{_W}{{24,64}}"),  # Supabase, PlanetScale, Netlify, Vercel
    ("sb_secret_", f"{_W}{{22,50}}"),
    ("PMAK-", f"{_HEX}{{24}}-{_HEX}{{34}}"),  # Postman
    ("pat-(?:na|eu)[0-9]-", UUID),  # HubSpot
    ("EAAA", f"{_W}{{60}}"),  # Square
    ("EAA", "[A-Za-z0-9]{80,250}"),  # Meta
    (r"access_token\$production\$", rf"[0-9a-z]{{16}}\${_HEX}{{32}}"),  # Braintree
    ("tskey-(?:api|auth|client|scim|webhook)-", "[A-Za-z0-9]{8,20}-[A-Za-z0-9]{20,40}"),  # Tailscale
    ("pul-", f"{_HEX}{{40}}"),  # Pulumi
    ("[sp]k\\.eyJ", rf"{_W}{{20,200}}\.{_W}{{20,40}}"),  # Mapbox
    ("GOOG", "[0-9A-Z]{20,60}"),  # Google storage
    ("IQoJb3JpZ2lu", "[A-Za-z0-9+/=]{100,2000}"),  # AWS, session
    ("FwoGZXIvYXdz", "[A-Za-z0-9+/=]{100,2000}"),
)
