"""E-mail and IP addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from engine.data.clean.pii.domains import COUNTRIES, GENERIC, INTERNATIONAL
from engine.data.clean.pii.scan import Scan, windows, words

# ---- e-mail ----

_RESERVED_TOPS = frozenset(("example", "test", "invalid", "localhost", "local", "internal", "lan", "localdomain"))
_RESERVED_NAMES = frozenset(("users.noreply.github.com",))
_PLACEHOLDERS = re.compile(r"(?:your|my)-?(?:domain|company|email|host|site|server)|example[0-9]?")
_PLACEHOLDER = re.compile(
    r"(?:you|your\.?(?:name|email|address)|name|user(?:name)?|some(?:one|body)|first(?:name)?\.?last(?:name)?|xxx+)"
    r"@(?:domain|company|email|mail|host|site|server|xxx+)\.[a-z]+"
)

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces, so words may adjoin an address
_ALPHABET = "A-Za-z0-9\u00c0-\u024f\u0370-\u052f\u0590-\u06ff\u0900-\u097f"
_LOCAL = (
    rf"(?:[{_ALPHABET}_](?:[{_ALPHABET}._%+-]|(?<=[A-Za-z])'(?=[A-Za-z])){{0,63}}"
    rf'|"[^"\n]{{1,62}}"|[{_CJK}]{{1,12}}(?=@[0-9-]{{0,8}}[{_CJK}]))'
)
_LABELS = rf"(?:(?:[{_ALPHABET}][{_ALPHABET}-]{{0,62}}|[{_CJK}0-9-]{{1,30}})\.){{1,6}}"
_TOP = rf"(?:xn--[A-Za-z0-9-]{{2,59}}|[A-Za-z]{{2,24}}|[{_ALPHABET}]{{2,20}}|[{_CJK}]{{1,10}})"
_EMAIL = re.compile(
    rf"(?<![{_ALPHABET}@._%+-])(?P<local>{_LOCAL})(?:@|&\#(?:64|x40);|%40)"
    rf"(?P<domain>{_LABELS}{_TOP})(?![A-Za-z0-9_(@\[-]|\.[A-Za-z0-9])",
    re.X,
)
_ATS = {at: re.compile(rf"{at}(?=\w)") for at in ("@", "&#64;", "&#x40;", "%40")}
_LOGIN = re.compile(r"://[^\s/@]*$")  # https://user:password@host
_MESSAGE_ID = re.compile(r"(?i:message-id|in-reply-to|references|content-id|cid)[\"']?:[^\n@]{0,60}$")
_REMOTE_SHELL = re.compile(r"(?:\b(?:ssh|scp|sftp|rsync|mosh|ssh-copy-id)\b[^\n@|;&]{0,60}|\b(?:git|hg|svn)\s+clone )$")
_MAIL_WORD = re.compile(r"(?i:e-?mails?|mail|mailto|邮箱|邮件|correo|courriel|<)[^\n@]{0,6}$")

_OPEN, _CLOSE = r"[\[({<]\ ?", r"\ ?[\])}>]"
_AT_WORDS = r"(?:at|AT|At|a|ät|@|arroba|arobase|ät|собака)"
_DOT_WORDS = r"(?:dot|DOT|Dot|\.|punkt|Punkt|PUNKT|point|punto|punt|点)"
_IN_BRACKETS = rf"\ ?{_OPEN}{_DOT_WORDS}{_CLOSE}\ ?"
_OBFUSCATED = re.compile(
    rf"""(?<![\w.@-])(?P<local>\w[\w+-]{{0,40}}(?:(?:\.|\ dot\ |\ DOT\ |{_IN_BRACKETS})[\w+-]{{1,40}}){{0,3}})
    (?:(?P<marked>\ ?{_OPEN}{_AT_WORDS}{_CLOSE}\ ?)|\ (?:at|AT)\ |@)
    (?P<domain>\w[\w-]{{0,40}}(?:(?P<dot>\.|\ (?:dot|DOT)\ |{_IN_BRACKETS})[\w-]{{1,40}}){{1,4}})""",
    re.X,
)
_ANY_DOT = re.compile(rf"\.|\ (?:dot|DOT)\ |{_IN_BRACKETS}", re.X)
_BRACKETED = re.compile(rf"[\[({{<] ?(?:{_AT_WORDS}|{_DOT_WORDS}) ?[\])}}>]")
_DOT = re.compile(" (?:dot|DOT) ")
_NO_NAMES = words("me us him her it them is are was look looks available shop online visit here only now")


def emails(scan: Scan) -> Iterator[tuple[int, int]]:
    """Spans of e-mail addresses: with an existing top-level domain (or the word e-mail before) and no reserved name."""
    text = scan.text
    for at in (pattern for sign, pattern in _ATS.items() if sign in text):
        for window in windows(text, at, 80, 260):
            for match in _EMAIL.finditer(text, *window):
                end = _domain_end(scan, match)
                if end and not _is_no_email(scan, match, end):
                    yield match.start(), end
    if " dot " in text or " DOT " in text:
        yield from _obfuscated(text, _DOT)
    yield from _obfuscated(text, _BRACKETED)


def _domain_end(scan: Scan, match: re.Match[str]) -> int:
    """End of the address, 0 if its domain does not exist or is reserved."""
    labels = match["domain"].lower().split(".")
    end = match.end()
    top = match["domain"].rpartition(".")[2]
    if len(labels) > 2 and not _is_top(top) and top.istitle():  # "a@b.com.Then ..."
        end -= len(labels.pop()) + 1
    top = labels[-1]
    if re.match(f"[{_CJK}]", top):  # words may follow without a space
        known = next((top[:n] for n in range(len(top), 0, -1) if top[:n] in INTERNATIONAL), "")
        return end - len(top) + len(known) if known else 0
    numbers = [label for label in labels[:-1] if label.isdigit()]
    if len(numbers) > 1 or any(len(n) < 3 for n in numbers) or re.fullmatch("[0-9]x", labels[0]):
        return 0  # package@version, or an icon name like logo@2x.png
    if _is_reserved(labels) or (len(labels) == 2 and top == "py"):  # Paraguay has .com.py; x@y.py is Python
        return 0
    if not _is_top(match["domain"].rpartition(".")[2] if end == match.end() else top):
        is_labelled = _MAIL_WORD.search(scan.before(match.start(), 16))
        return end if is_labelled and top.isalpha() and len(top) > 2 and top not in _RESERVED_TOPS else 0
    return end


def _is_top(top: str) -> bool:
    """Whether a top-level domain exists, in a plausible case (not the .mT of a matrix)."""
    one_case = top.islower() or top.isupper() or top.istitle() or not top.isascii()
    low = top.lower()
    return (low in COUNTRIES and one_case) or low in GENERIC or low in INTERNATIONAL or low.startswith("xn--")


def _is_reserved(labels: list[str]) -> bool:
    name = ".".join(labels)
    if labels[-1] in _RESERVED_TOPS or any(name == n or name.endswith("." + n) for n in _RESERVED_NAMES):
        return True
    registered = labels[-3] if len(labels) > 2 and labels[-2] in ("co", "com", "org", "net", "ac") else labels[-2]
    return _PLACEHOLDERS.fullmatch(registered) is not None


def _is_no_email(scan: Scan, match: re.Match[str], end: int) -> bool:
    local = match["local"]
    before = scan.before(match.start(), 80)
    return bool(
        (".." in local and not local.startswith('"'))
        or local.endswith(".")
        or (scan.after(end, 2)[:1] == ":" and scan.after(end, 2)[1:] in ("/", "~", "."))
        or (local in ("git", "hg", "svn") and scan.after(end, 1) in (":", "/"))
        or _PLACEHOLDER.fullmatch(match[0].lower())
        or _LOGIN.search(before)
        or _MESSAGE_ID.search(before)
        or _REMOTE_SHELL.search(before)
    )


def _obfuscated(text: str, gate: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Spans of obfuscated addresses, such as jane [at] posteo (dot) de, jane at posteo dot de."""
    for match in (match for window in windows(text, gate, 64, 96) for match in _OBFUSCATED.finditer(text, *window)):
        labels = [label.lower() for label in _ANY_DOT.split(match["domain"])]
        while len(labels) > 2 and not _is_top(labels[-1]):
            labels.pop()
        spelled = match["dot"] != "." or match["marked"]
        words_only = not match["marked"] and "@" not in match[0]
        if words_only and (match["dot"].strip().lower() != "dot" or match["local"].lower() in _NO_NAMES):
            continue
        if spelled and len(labels) > 1 and _is_top(labels[-1]) and not _is_reserved(labels):
            yield match.span()


# ---- IP ----

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_POINT = r"(?:\.|\[\.\]|\(\.\)|\[dot\]|\(dot\))"
_IPV4 = re.compile(
    rf"(?<![A-Za-z0-9_.-])(?<![fF]:)(?:{_OCTET}{_POINT}){{3}}{_OCTET}(?![A-Za-z0-9_]|\.[0-9A-Za-z]|"
    rf"-(?!{_OCTET}\.{_OCTET}\.)[0-9A-Za-z])"
)
_SECOND_OF_RANGE = re.compile(rf"(?<=[0-9]-)(?:{_OCTET}\.){{3}}{_OCTET}(?![A-Za-z0-9_-]|\.[0-9A-Za-z])")
_IPV6 = re.compile(
    r"(?:(?<![A-Za-z0-9_:.])|(?<=[g-z]:)|(?<=ip6:)|(?<=v6:))(?:[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}|"
    r"(?:0{0,4}:){2,6}[fF]{4}:)(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3})?"
    r"(?:%[0-9A-Za-z]{1,15})?(?![A-Za-z0-9_:])"
)
_DOTTED = re.compile(r"[0-9][0-9]{0,2}(?:(?:\.|\[\.\]|\(\.\)|\[dot\]|\(dot\))[0-9]{1,3}){3}")
_COLONS = re.compile(r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}")
_MAPPED = re.compile(":[fF]{4}:[0-9]")
_BEFORE_VERSION = re.compile(
    r"(?i:\b(?:versions?|ver\.?|releases?|build|rev(?:ision)?\.?|firmware|driver|update[ds]?|upgraded?|downgraded?|"
    r"patch|"
    r"sections?|sec\.|chapter|clause|paragraph|table|figure|fig\.|appendix|article|item|rule|step|requirement|"
    r"abschnitt|"
    r"kapitel|ziffer|tabelle|abbildung|chapitre|paragraphe|tableau|sección|capítulo|versión|versione|oid|snmp|"
    r"object ?identifier)|"
    r"§|版本号?|版|章节?|小节|节|第|条|固件|升级到|更新到|升级|(?<![ \t])==|[<>~!]=|[~^])"
    r"[ \t:：=\"'`(]{0,4}(?:from |to |auf |à |a |number |no\. |of |nr\. ?|是|为|号)?[ \t:：=\"'`(]{0,3}[vVrR]?\.?$"
)
_VERSION_LIST = re.compile(
    r"(?i:versions?|releases?|upgrad\w+|updat\w+|downgrad\w+|版本)[^\n.!?;]{0,8}[0-9.]{5,15}[^\n!?;]{1,12}$"
)
_AFTER_VERSION = re.compile(
    r"[\"'`)]?[ \t]?(?i:\(?(?:released?|lts|beta|alpha|rc[0-9]?|stable|ga|sp[0-9]|build|final|nightly|preview|"
    r"version|update|patch|hotfix|firmware|driver|changelog|ist erschienen|发布|版本?|正式版|及以上)\b|\+(?![0-9])|"
    r"(?:is|was|has been) (?:out|released|available))"
)
_AFTER_VERSION_CJK = re.compile(r"[ \t]?(?:发布|版本|正式版|及以上|更新)")
_AGENT = re.compile(r"[A-Za-z]/v?$")  # Chrome/120.0.0.0
_HEADING = re.compile(r"(?:^|\n)[#*| \t]{0,8}$")
_BEFORE_ADDRESS = re.compile(
    r"(?:(?i:(?:\b|_)(?:ip(?:v4)?s?|addr(?:ess(?:es)?)?|adressen?|dirección|hosts?|hostnames?|(?:name)?servers?|"
    r"serveur|"
    r"clients?|peer|ping|ssh|telnet|curl|wget|port|via|dns|resolver|gateway|router|remote|src|dst|source|destination|"
    r"forwarded|connect(?:ed|ing)?|log(?:ged|in)|bann?(?:ed)?|block(?:ed|list)?|listen(?:ing|s)?|subnet|network|whois|"
    r"traceroute|nslookup|dig|bind|proxy|route|node|requests?|visitors?|attacks?|scan(?:ned|s)?|firewall|allow|deny|"
    r"iptables|endpoint|from|for|against|von|depuis|desde)\b|://)|(?<=[a-z])(?:IP|Ip|Addr|Address|Host)\b|"
    r"地址|登录|服务器|主机|来自|访问|网关|端口|攻击|封禁|服务端|客户端)[^\n]{0,24}$"
)
_AFTER_ADDRESS = re.compile(r":[0-9]{2,5}(?![0-9.])|/(?:[0-9]|[12][0-9]|3[0-2])(?![0-9.])|/[a-z?]|[\]\"']:[0-9]")


def ips(scan: Scan) -> Iterator[tuple[int, int]]:
    """Spans of public IPv4 and IPv6 addresses; four small numbers count only if the context mentions an address."""
    text = scan.text
    for window in windows(text, _DOTTED, 3):
        for pattern in (_IPV4, _SECOND_OF_RANGE):
            for match in pattern.finditer(text, *window):
                value = re.sub(r"[^0-9]+", ".", match[0])
                if _is_public(value) and not _is_version(scan, value, match):
                    yield match.span()
    gates = (_COLONS, _MAPPED) if ":ffff:" in text or ":FFFF:" in text else (_COLONS,)
    for window in (window for gate in gates for window in windows(text, gate, 24, 44)):
        for match in _IPV6.finditer(text, *window):
            value = match[0].rstrip(":") if not match[0].endswith("::") else match[0]
            if value.count(":") >= 2 and _is_public(value):
                yield match.start(), match.start() + len(value)


def _is_version(scan: Scan, value: str, match: re.Match[str]) -> bool:
    """Whether it is a version, section number or OID: by the context, or small numbers without a word for hosts."""
    before, after = scan.before(match.start(), 48), scan.after(match.end(), 16)
    numbers = [int(part) for part in value.split(".")]
    if re.match(r" - (?:-|[a-z]+) \[", after):
        return False
    if _BEFORE_VERSION.search(before) or (_AGENT.search(before) and not before.endswith("://")):
        return True
    if _AFTER_VERSION.match(after) or _AFTER_VERSION_CJK.match(after) or _VERSION_LIST.search(before):
        return True
    if max(numbers) < 30 and _HEADING.search(before) and re.match(r"[ \t]+[^\W\d_]", after):
        return True
    small = (numbers[0] < 30 and (max(numbers) < 100 or 0 in numbers or numbers[0] < 3)) or numbers[2:] == [0, 0]
    if small and re.search("(?i:upgrad|updat|downgrad|bump|migrat|releas|version)", before):
        return True
    return small and not (_AFTER_ADDRESS.match(after) or _BEFORE_ADDRESS.search(before))


def _is_public(value: str) -> bool:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _IPV6_DOCUMENTATION:
            return False
    return address.is_global and not address.is_multicast


_IPV6_DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")  # RFC 9637; Python 3.13 does not know it
