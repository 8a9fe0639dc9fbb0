"""Personal data and secrets in text: e-mail and IP addresses, phones, Chinese ID numbers, bank cards, API keys.

A cheap scan finds the places, a pattern proposes, a check decides: check digits, calendar dates, issuer and country
prefixes, reserved ranges, and the few characters around. What is reserved for documentation or cannot reach a person
(example.com, 192.168.*, 555-0100) is no finding. Every repetition is bounded, so that no text takes long.

Order decides overlaps: a kind that is listed earlier in `KINDS` takes the characters.
"""

from __future__ import annotations

import bisect
import datetime
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True)
class Finding:
    """text[begin:end] is of this kind."""

    kind: str
    begin: int
    end: int


def find(text: str, kinds: Sequence[str] = ()) -> list[Finding]:
    """All findings in order, none overlapping. `kinds`: a subset of KINDS, empty: all."""
    taken: list[Finding] = []
    for kind, search in KINDS.items():
        if not kinds or kind in kinds:
            for begin, end in search(text):
                _take(taken, Finding(kind, begin, end))
    return taken


def mask(text: str, findings: Sequence[Finding]) -> str:
    """The text with each finding replaced by its kind in brackets, such as [EMAIL]."""
    pieces, position = [], 0
    for finding in findings:
        pieces += [text[position : finding.begin], f"[{finding.kind.upper()}]"]
        position = finding.end
    return "".join(pieces) + text[position:]


def hint(value: str) -> str:
    """Enough of a finding to recognise its form, too little to use it: first and last two characters."""
    return value[:2] + "*" * min(12, max(1, len(value) - 4)) + value[-2:] if len(value) > 5 else "*" * len(value)


def _take(taken: list[Finding], finding: Finding) -> None:
    """Insert it in order of text, unless something there overlaps it."""
    at = bisect.bisect_left(taken, finding.begin, key=lambda other: other.begin)
    after_last = at == 0 or taken[at - 1].end <= finding.begin
    before_next = at == len(taken) or finding.end <= taken[at].begin
    if after_last and before_next:
        taken.insert(at, finding)


def _windows(text: str, gate: re.Pattern[str], before: int = 0, after: int = 4) -> Iterator[tuple[int, int]]:
    """Where to look with a costly pattern: around what the cheap `gate` finds. Windows do not overlap."""
    begin = end = -1
    for match in gate.finditer(text):
        left, right = max(0, match.start() - before), min(len(text), match.end() + after)
        if left <= end:
            end = right
            continue
        if end > 0:
            yield begin, end
        begin, end = left, right
    if end > 0:
        yield begin, end


def _within(text: str, pattern: re.Pattern[str], gate: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Matches of `pattern`, which lie at or up to three characters before what `gate` finds."""
    for window in _windows(text, gate, 3):
        yield from pattern.finditer(text, *window)


# ---- API keys and other secrets ----

_KEY_FORMS = (
    r"(?:AKIA|ASIA)[0-9A-Z]{16}",  # AWS
    r"gh[opusr]_[A-Za-z0-9]{36}",  # GitHub
    r"github_pat_[A-Za-z0-9_]{60,90}",
    r"glpat-[A-Za-z0-9_-]{20}",  # GitLab
    r"sk-[A-Za-z0-9_-]{20,200}",  # OpenAI, Anthropic, DeepSeek and others
    r"hf_[A-Za-z0-9]{30,40}",  # Hugging Face
    r"AIza[0-9A-Za-z_-]{35}",  # Google
    r"xox[abprs]-[0-9A-Za-z-]{20,200}",  # Slack
    r"[sr]k_live_[0-9A-Za-z]{20,100}",  # Stripe
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-[A-Za-z0-9_-]{60,250}",
    r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",  # SendGrid
    r"LTAI[0-9A-Za-z]{12,26}",  # Aliyun
    r"AKID[0-9A-Za-z]{32}",  # Tencent
    r"[0-9]{8,10}:AA[A-Za-z0-9_-]{33}",  # Telegram
)
_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{'|'.join(_KEY_FORMS)})(?![A-Za-z0-9_-])")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<name>(?:[A-Z]{2,10} )?PRIVATE KEY(?: BLOCK)?)-----[^-]{40,20000}-----END (?P=name)-----"
)
_JSON_WEB_TOKEN = re.compile(r"eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{20,1000}")
_LONG_TOKEN = re.compile(r"[A-Za-z0-9_+/-][A-Za-z0-9_+/-]{15,}={0,2}")
_NAME_BEFORE = re.compile(
    r"(?i:api[_-]?key|secret(?:[_-]?(?:access[_-]?)?key)?|(?:access|auth|api|bearer)[_-]?token|access[_-]?key|"
    r"client[_-]?secret|passw(?:or)?d)[\"']?[ \t]{0,4}(?::|=|:=)[ \t]{0,4}[\"']?$"
)
_MAX_SECRET = 200  # characters; what is longer is data


def _api_keys(text: str) -> Iterator[tuple[int, int]]:
    for pattern in (_PRIVATE_KEY, _JSON_WEB_TOKEN):
        for match in pattern.finditer(text):
            yield match.span()
    for window in _windows(text, _LONG_TOKEN, 12, 60):
        for match in _KEY.finditer(text, *window):
            if _is_random(match[0].rpartition("_")[2] if match[0].startswith(("sk_", "rk_")) else match[0]):
                yield match.span()
    for match in _LONG_TOKEN.finditer(text):
        if match[0].isalpha():
            continue
        goes_on = text[match.end() : match.end() + 1] in tuple(".([")  # a call or an expression, not a value
        named = _NAME_BEFORE.search(text, max(0, match.start() - 48), match.start()) if not goes_on else None
        if named and len(match[0]) <= _MAX_SECRET and _is_random(match[0]):
            yield match.span()


def _is_random(value: str) -> bool:
    """Letters and digits mixed with the entropy of a drawn string: a placeholder or a name is not."""
    if value.isalpha() or not any(c.isdigit() for c in value) or not any(c.isalpha() for c in value):
        return False
    if re.search(r"(?i)x{5}|example|your|placeholder|changeme|\.\.\.|1234567|abcdefg", value):
        return False
    counts = Counter(value)
    entropy = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    return entropy >= 3.0


# ---- e-mail ----

_GENERIC_DOMAINS = _words(
    "com org net edu gov mil int info biz name pro mobi asia jobs tel coop aero museum travel cat app dev xyz online "
    "site tech store shop club top vip cloud email live work wang ltd group ink blog news media agency digital company "
    "academy science health law bank design studio world life today space website link global wiki page team "
    "foundation fun icu art network systems solutions services software consulting center university school"
)
_FILE_SUFFIXES = _words("py js ts md sh rs cc pl so ps gz cs mm ml")  # also countries; 2x.py is a file
_RESERVED_NAMES = frozenset(("example.com", "example.org", "example.net", "example.edu", "users.noreply.github.com"))
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+/-])(?P<local>[A-Za-z0-9_][A-Za-z0-9._%+-]{0,63})@"
    r"(?P<domain>(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,6}(?P<top>[A-Za-z]{2,24}))(?![A-Za-z0-9_(@-]|\.[A-Za-z0-9])"
)
_AT = re.compile("@")
_LOGIN = re.compile(r"://[^\s/@]*$")  # https://user:password@host


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for window in _windows(text, _AT, 80, 260):
        for match in _EMAIL.finditer(text, *window):
            top, domain, local = match["top"].lower(), match["domain"].lower(), match["local"]
            known = top in _GENERIC_DOMAINS or (
                len(top) == 2 and not (top in _FILE_SUFFIXES and domain.count(".") == 1)
            )
            reserved = any(domain == name or domain.endswith("." + name) for name in _RESERVED_NAMES)
            repository = local == "git" and text[match.end() : match.end() + 1] in (":", "/")
            login = _LOGIN.search(text, max(0, match.start() - 80), match.start())
            if known and not (reserved or repository or login or ".." in local or local.endswith(".")):
                yield match.span()


# ---- IP ----

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = re.compile(rf"(?<![A-Za-z0-9_.-])(?:{_OCTET}\.){{3}}{_OCTET}(?![A-Za-z0-9_]|\.[0-9A-Za-z]|-[0-9A-Za-z])")
_IPV6 = re.compile(r"(?<![A-Za-z0-9_:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![A-Za-z0-9_:])")
_DOTTED = re.compile(r"[0-9][0-9]{0,2}(?:\.[0-9]{1,3}){3}")
_COLONS = re.compile(r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}")
_BEFORE_VERSION = re.compile(
    r"(?i:version|ver\.?|release|build|rev(?:ision)?\.?|firmware|driver|update|upgrade[ds]?(?: to)?|section|sec\.|"
    r"chapter|clause|table|figure|fig\.|appendix|article|oid|§|版本号?|版|章节|第|[=<>~^!]=|[<>~^])[ \t:：=\"'vV]{0,3}$"
)
_AGENT = re.compile(r"[A-Za-z]/$")  # Chrome/120.0.0.0
_HEADING = re.compile(r"(?:^|\n)[#* \t]{0,8}$")


def _ips(text: str) -> Iterator[tuple[int, int]]:
    for match in _within(text, _IPV4, _DOTTED):
        before = text[max(0, match.start() - 24) : match.start()]
        if _BEFORE_VERSION.search(before) or _AGENT.search(before):
            continue
        numbers = [int(part) for part in match[0].split(".")]
        if max(numbers) < 30 and _HEADING.search(before) and re.match(r"[ \t]+[^\W\d_]", text[match.end() :][:8]):
            continue
        if _is_public(match[0]):
            yield match.span()
    for match in _within(text, _IPV6, _COLONS):
        value = match[0].rstrip(":") if not match[0].endswith("::") else match[0]
        if value.count(":") >= 2 and _is_public(value):
            yield match.start(), match.start() + len(value)


def _is_public(value: str) -> bool:
    try:
        address = ipaddress.ip_address(value)
        return address.is_global and not address.is_multicast
    except ValueError:
        return False


# ---- numbers ----

_DIGITS = re.compile(r"[0-9][0-9 ().+/-]{5,}[0-9Xx]")

_NOT_IN_NUMBER = r"(?<![A-Za-z0-9_.,/=#$€¥-])"
_NUMBER_ENDS = r"(?![A-Za-z0-9_]|[.,/:-][0-9])"
_BEFORE_CODE = re.compile(
    r"(?i:order|tracking|invoice|ticket|receipt|transaction|batch|part|item|serial|sku|imei|iccid|isbn|issn|upc|ean|"
    r"barcode|timestamp|epoch|case|ref(?:erence)?|\bid|uid|seed|checksum|#|订单|单号|运单|快递|流水|编号|序列号|条码|"
    r"时间戳|批号|货号)[ \t]{0,2}(?i:number|num|no\.?|code|id|号码?)?[ \t]{0,2}(?:is|为|是)?[ \t:：=#]{0,3}$"
)


def _is_code(text: str, begin: int) -> bool:
    """Whether the words before say that the number is an order, a serial number, a timestamp."""
    return _BEFORE_CODE.search(text[max(0, begin - 28) : begin]) is not None


_CN_ID = re.compile(rf"{_NOT_IN_NUMBER}[1-8][0-9]{{16}}[0-9Xx](?![A-Za-z0-9_]|[.-][0-9])")
_PROVINCES = _words(
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 82 83"
)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def _cn_ids(text: str) -> Iterator[tuple[int, int]]:
    for match in _within(text, _CN_ID, _DIGITS):
        if is_cn_id(match[0]):
            yield match.span()


def is_cn_id(value: str) -> bool:
    """Province, birth date and check digit (GB 11643, ISO 7064 mod 11-2) of an 18-character Chinese ID number."""
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, value))
    if value[:2] not in _PROVINCES or "10X98765432"[total % 11] != value[17].upper():
        return False
    try:
        return 1880 <= datetime.date(int(value[6:10]), int(value[10:12]), int(value[12:14])).year <= 2100
    except ValueError:
        return False


_CARD = re.compile(
    rf"{_NOT_IN_NUMBER}[2-6](?:[0-9]{{12,18}}|[0-9]{{3}}(?:[ -][0-9]{{4,6}}){{2,4}}(?:[ -][0-9]{{1,3}})?)"
)
_TEST_CARDS = _words(
    "4111111111111111 4242424242424242 4012888888881881 5555555555554444 5105105105105100 378282246310005 "
    "371449635398431 6011111111111117 30569309025904 3530111333300000 4000056655665556"
)  # of payment manuals: nobody's


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for match in _within(text, _CARD, _DIGITS):
        digits = re.sub("[ -]", "", match[0])
        if re.match(r"[A-Za-z0-9_]|[.,-][0-9]", text[match.end() : match.end() + 2]):
            continue
        if is_card(digits) and digits not in _TEST_CARDS and not _is_code(text, match.start()):
            yield match.span()


def is_card(digits: str) -> bool:
    """An issuer's prefix, its length, and the Luhn check digit."""
    first, n = int(digits[:4]), len(digits)
    issued = (
        (digits[0] == "4" and n in (13, 16, 19))  # Visa
        or ((5100 <= first <= 5599 or 2221 <= first <= 2720) and n == 16)  # Mastercard
        or (digits[:2] in ("34", "37") and n == 15)  # American Express
        or ((first == 6011 or 6440 <= first <= 6599) and 16 <= n <= 19)  # Discover
        or (digits[:2] == "62" and 16 <= n <= 19)  # UnionPay
        or (3528 <= first <= 3589 and 16 <= n <= 19)  # JCB
        or ((3000 <= first <= 3059 or digits[:2] in ("36", "38", "39")) and n == 14)  # Diners
    )
    return issued and luhn(digits) and len(set(digits)) > 2


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(int(digit) for digit in digits[-1::-2]) + sum(doubled)) % 10 == 0


_CN_MOBILE = re.compile(
    r"(?<![A-Za-z0-9_.,/=#$€¥+-])(?:(?:\+|00)?86[ -]?)?"
    r"1(?:3[0-9]|4[0145-9]|5[0-35-9]|6[2567]|7[0-8]|8[0-9]|9[0-35-9])(?P<gap>[ -]?)[0-9]{4}(?P=gap)[0-9]{4}"
    + _NUMBER_ENDS
)
_CN_PLUS = re.compile(r"(?<![A-Za-z0-9_])\+86[ -]?1[3-9][0-9](?P<gap>[ -]?)[0-9]{4}(?P=gap)[0-9]{4}" + _NUMBER_ENDS)
_CN_LANDLINE = re.compile(
    rf"{_NOT_IN_NUMBER}(?:\(0[1-9][0-9]{{1,2}}\)[ -]?|0[1-9][0-9]{{1,2}}-)"
    r"[2-9](?:[0-9]{6,7}|[0-9]{3}[ -][0-9]{4})" + _NUMBER_ENDS
)
_WORLD = re.compile(
    r"(?<![A-Za-z0-9_+])\+[1-9][0-9]{0,2}(?:[ .-]?\(0?[0-9]{1,4}\))?(?:[ .-]?[0-9]{1,12}){1,6}" + _NUMBER_ENDS
)
_US = re.compile(
    rf"{_NOT_IN_NUMBER}(?:\+?1[ .-])?(?:\([2-9][0-9]{{2}}\)[ .-]?|[2-9][0-9]{{2}}(?P<gap>[.-]))"
    r"[2-9][0-9]{2}(?(gap)(?P=gap)|[ .-])[0-9]{4}" + _NUMBER_ENDS
)
_LABEL_BEFORE = re.compile(
    r"(?i:\b(?:tel(?:ephone)?|phone|mobile|cell|call(?: me)?(?: at| on)?|whatsapp|fax|telefon|tél)\b|"
    r"电话|手机号?码?|联系方式)[ \t.:：]{0,4}(?:(?i:is|no\.?|number|为|是)[ \t:：]{0,2})?$"
)
_LABELLED = re.compile(r"\(?[0-9][0-9()/ .-]{5,18}[0-9]" + _NUMBER_ENDS)
_COUNTRY_CODES = _words(
    "1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65 66 81 82 84 "
    "86 90 91 92 93 94 95 98 211 212 213 216 218"
)


def _phones(text: str) -> Iterator[tuple[int, int]]:
    for pattern in (_CN_PLUS, _CN_MOBILE, _CN_LANDLINE, _US):
        for match in _within(text, pattern, _DIGITS):
            digits = re.sub("[^0-9]", "", match[0])
            fictional = pattern is _US and re.fullmatch("55501[0-9]{2}", digits[-7:]) is not None
            if not fictional and not _is_code(text, match.start()) and len(set(digits[-8:])) > 1:
                yield match.span()
    for match in _within(text, _WORLD, _DIGITS):
        digits = re.sub("[^0-9]", "", match[0])
        decimal = re.fullmatch(r"\+[0-9]+\.[0-9]+", match[0]) is not None
        if not decimal and _is_world_number(digits):
            yield match.span()
    for match in _within(text, _LABELLED, _DIGITS):
        digits = re.sub("[^0-9]", "", match[0])
        fictional = re.fullmatch("(?:1?[0-9]{3})?55501[0-9]{2}", digits) is not None
        labelled = _LABEL_BEFORE.search(text, max(0, match.start() - 28), match.start())
        if labelled and 7 <= len(digits) <= 15 and not fictional and len(set(digits)) > 2:
            yield match.span()


def _is_world_number(digits: str) -> bool:
    """Digits behind a plus sign: a country's code and a length that exists there."""
    if digits[0] == "1":
        return re.fullmatch("1[2-9][0-9]{2}[2-9][0-9]{6}", digits) is not None and digits[4:9] != "55501"
    code = next((digits[:n] for n in (2, 3) if digits[:n] in _COUNTRY_CODES), digits[0] if digits[0] == "7" else "")
    known = bool(code) or re.match("2[2-9]|3[578]|42|5[09]|6[789]|8[058]|9[679]", digits) is not None
    if not known or len(set(digits[-7:])) < 3:
        return False
    return len(digits) == 13 if digits.startswith("861") else 9 <= len(digits) <= 15


KINDS: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
    "api_key": _api_keys,
    "email": _emails,
    "cn_id": _cn_ids,
    "bank_card": _cards,
    "ip": _ips,
    "phone": _phones,
}
