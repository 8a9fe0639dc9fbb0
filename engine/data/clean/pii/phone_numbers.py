"""Phone numbers: international, by the numbering plan of the country; in national forms; and after a word for phone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from engine.data.clean.pii.numbers import NOT_IN_NUMBER, NUMBER_ENDS, digits_of, is_code
from engine.data.clean.pii.scan import Scan, words

_SEP = r"(?: ?/(?! ?(?:\+|0(?:[ .-]?[0-9]){8})) ?| ?[-.] ?| )"
_EXTENSION = re.compile(
    r"(?:,? ?(?i:ext\.?|extension|extn\.?|x|durchwahl|dw|nebenstelle|poste|interno|int\.|#)[ .:]{0,2}|;ext=| ?(?:转|"
    r"轉|分机|内線)[: ]{0,2})"
    r"[0-9]{1,6}(?![0-9A-Za-z])|-[0-9]{1,5}(?![0-9A-Za-z-]|[.:/][0-9])"
)
_ENDS = re.compile(NUMBER_ENDS)

# ---- words ----

_LABELS = words(
    "tel telephone telefono telefone telefoon telefon telefax telefonnummer teléfono téléphone telef tlf tlfno tél "
    "tfno tfn phone ph phonenumber phoneno mob mobile mobil mobilnummer mobiltelefon mobiel cell cellular "
    "cellulare cellulaire cellphone cel celular handy handynummer portable móvil movil fax faxnummer ruf rufnummer "
    "rufen anruf whatsapp signal sms hotline helpline landline festnetz fixe fijo natel gsm contact kontakt "
    "contacto contactez call called calling dial text ring reach erreichbar erreichen anrufen appeler appelez "
    "appelle joignable llamar llama llame llámame llámenos llamanos chiamare chiama bel bellen telefoni "
    "telefonisch tfon hp nummer rückruf t m telno mobileno ligue telemóvel telemovel fone телефон тел моб звоните "
    "мобильный telefonu telefonszám zentrale sekretariat durchwahl telefonnr mobilfunk mobilfunknummer "
    "notfallnummer festnetznummer rückrufnummer joindre standard composez rappeler rappelez secrétariat texto "
    "teléfonos centralita llamad contacte telefonare fisso switchboard reception enquiries pager callback "
    "voicemail voice texted dialed dialled phoned rang telephoned tty mobiltel"
)
_FILLERS = words(
    "no nr n number numbers nummer numero número numéro is me us him her them at on or and text call under unter "
    "der die ist lautet au le est al el es en por tel fax mobile mobil office home work direct main via uns mich "
    "an ihn sie to from for our my the new old o oder et y e ou privat dienstlich büro bureau domicile travail "
    "casa oficina emergency daytime evening day sent b i span strong td line be pro personal business customer "
    "support user contact"
)
_MY_NUMBER = words("my his her our your their mein meine seine ihre mon son votre mi su mio")
_NUMBER_WORDS = words("number nummer numero número numéro")
_CJK_LABELS = tuple(
    words(
        "电话 電話 手机 手機 座机 固话 传真 傳真 联系 聯絡 致电 拨打 拨 来电 热线 携帯 连络 連絡先 전화 연락처 휴대폰 "
        "핸드폰 팩스 移动 电话号码 電話番号 전화번호 手机号 手机号码 手机号是 联系方式 联系人 电话是 客服 咨询 报名 "
        "预约 总机 打给 联系我 手机为 电话为 ☎ 📞 📱 ✆ 🕿 ☏ 微信 短信"
    )
)
_LAST_WORD = re.compile(r"([^\W\d_]+)[1-9]?[^\w\n]{0,7}$")
_INITIAL = re.compile(r"(?:^|[\n|,;·])[ \t]{0,4}[TM][.:]$")
_JOINS = re.compile(r"[ \t:：=|,.\"'(（*>\[+是为は-]{1,12}$")
_NO_LABEL = re.compile(
    r"(?i:calls|call id|call cent(?:re|er)|contact id|text size|work order|to text|m/s|at home|call to|from the)$"
)


def has_label(scan: Scan, begin: int) -> bool:
    """Whether a word for phone occurs before the number, with at most a few words such as `number is` between."""
    before = scan.before(begin, 64)
    bare = _JOINS.sub("", before)
    scheme = bare.endswith(("wa.me/", "tel", "callto", "sms")) and before[-1:] in (":", "/")
    if scheme or bare.endswith(_CJK_LABELS):
        return True
    heading = scan.heading(begin)
    if heading and (heading.endswith(_CJK_LABELS) or not _LABELS.isdisjoint(re.split(r"[^\w]+|_", heading.lower()))):
        return True
    for count in range(5):
        match = _LAST_WORD.search(before)
        if match is None:
            return False
        word = match[1].lower()
        if word in _LABELS and (len(word) > 1 or _INITIAL.search(before[: match.end(1) + 1])):
            return _NO_LABEL.search(before[: match.end(1)]) is None
        before = before[: match.start()].rstrip("_")
        owner = _LAST_WORD.search(before) if word in _NUMBER_WORDS else None
        if owner and owner[1].lower() in _MY_NUMBER:
            return True
        if word not in _FILLERS:
            return False
        before += ":" if count else ""
    return False


# ---- international numbers, after + or 00: digits after the country code, ITU-T E.164 ----

_PLAN_LENGTHS = words(
    "1:10-10 7:10-10 20:8-10 27:9-9 30:10-10 31:9-9 32:8-9 33:9-9 34:9-9 36:8-9 39:8-11 40:9-9 41:9-9 43:7-13 "
    "44:9-10 45:8-8 46:7-10 47:8-8 48:9-9 49:7-12 51:8-9 52:10-11 53:6-8 54:10-11 55:10-11 56:9-9 57:8-10 58:10-10 "
    "60:8-10 61:9-9 62:8-12 63:8-10 64:8-10 65:8-8 66:8-9 81:9-10 82:8-10 84:9-10 86:10-11 90:10-10 91:10-10 "
    "92:9-10 93:9-9 94:9-9 95:7-10 98:10-10 351:9-9 352:6-11 353:7-9 354:7-7 358:6-11 380:9-9 385:8-9 386:8-8 "
    "420:9-9 421:9-9 852:8-8 853:8-8 855:8-9 880:8-10 886:8-9 966:8-9 971:8-9 972:8-9"
)
_PLANS = {
    code: (int(low), int(high)) for code, low, high in (re.split("[:-]", entry) for entry in sorted(_PLAN_LENGTHS))
}
_OTHER_PLANS = re.compile("(?:2[1-69]|3[578]|42|5[09]|6[789]|8[058]|9[67])[0-9]|99[2-8]")

_DIALLED = words("31 32 33 34 39 41 43 44 45 46 47 48 49 81 82 86 91")  # codes accepted after 00 without a space

# Numbers that regulators reserve for films and books: country code and national number.
_FICTION = re.compile(
    r"1[2-9][0-9]{2}55501[0-9]{2}|"
    r"44(?:11[3-8]496|1[2-6]1496|191498|207946|289649|292018|808157|909879)0[0-9]{3}|44289649[67][0-9]{3}|"
    r"44(?:1632960|7700900|3069990)[0-9]{3}|33(?:19900|26191|35301|46571|53649|63998)[0-9]{4}|"
    r"61[2378](?:5550|7010)[0-9]{4}|61491570[0-9]{3}|3532091[0-9]{5}|"
    r"49(?:3023125|6990009|4066969|2214710|8999998)[0-9]{3}|49(?:17139200|176040690)[0-9]{2,3}"
)

_CANDIDATE = (
    rf"(?:\((?:\+|00)[1-9][0-9]{{0,3}}\)|\(?(?:\+|(?<![0-9)\]*] )\+ |\b00 ?|\b011 )[1-9][0-9]{{0,14}}+)"
    rf"(?:{_SEP}?\(0\){_SEP}?[0-9]{{1,14}}+)?(?:(?:{_SEP}?\(|\){_SEP}?|{_SEP})[0-9]{{1,14}}+){{0,6}}+"
)
_INTERNATIONAL = re.compile(rf"(?<![A-Za-z0-9_+#$€£¥])(?<![0-9][./:-]){_CANDIDATE}")


def _international_end(scan: Scan, match: re.Match[str]) -> int:
    """End of the number, 0 if it is none."""
    end = match.end()
    while end > match.start() and not (_ends_here(scan, end) and _fits_plan(scan.text[match.start() : end])):
        end = _shorter(scan, match.start(), end)
    return end


_SHORTER = re.compile(r".*[0-9)](?=[ ]+\(?[0-9]+\)?$|[ -]+[0-9]{1,5}$)", re.S)


def _shorter(scan: Scan, begin: int, end: int) -> int:
    """End without the last group, which may be another number (after a space) or an extension (after a hyphen)."""
    shorter = _SHORTER.match(scan.text, begin, end)
    return shorter.end() if shorter else 0


def _ends_here(scan: Scan, end: int) -> bool:
    return _ENDS.match(scan.text, end) is not None or _EXTENSION.match(scan.text, end) is not None


def _fits_plan(number: str) -> bool:
    sign = re.match(r"\(?(\+|00|011 )", number)
    digits = digits_of(number[sign.end() if sign else 0 :].replace("(0)", ""))
    code = next((digits[:n] for n in (3, 2, 1) if digits[:n] in _PLANS), "")
    if not code and _OTHER_PLANS.match(digits):
        code = digits[:3]
    rest = digits[len(code) :]
    first = re.search("[0-9]+", number[sign.end() if sign else 0 :])
    if first and len(first[0]) < len(code):
        return False  # columns
    if not code or len(set(digits[-7:])) < 2 or re.fullmatch(r"\+[0-9]+\.[0-9]+", number):
        return False
    if rest[0:1] == "0" and code not in ("39", "225", "242", "228"):
        rest = rest[1:]
    low, high = _PLANS.get(code, (7, 10))
    if not low <= len(rest) <= high or _FICTION.fullmatch(code + rest):
        return False
    if sign and sign[1] != "+" and number.isdigit() and code not in _DIALLED:
        return False  # an identifier padded with zeros
    if code == "1":
        return re.match("[2-9][0-9]{2}[2-9]", rest) is not None
    if code == "86":
        return re.fullmatch("1[3-9][0-9]{9}|[2-9][0-9]{8,10}|10[0-9]{8}", rest) is not None
    return rest[0] in {"33": "123456789", "34": "56789"}.get(code, "0123456789")


# ---- national forms with a leading 0 ----

_LEADING_ZERO = re.compile(
    rf"{NOT_IN_NUMBER}(?<![A-Za-z][./])(?<!\+)(?:\(0[1-9][0-9]{{0,4}}\)|0[1-9][0-9]{{0,4}}(?![0-9])|"
    rf"(?P<joined>0[1-9][0-9]{{8,10}}+))"
    rf"(?(joined)|(?:{_SEP}?[0-9]{{2,9}}+)(?:{_SEP}[0-9]{{1,6}}+){{0,5}}+)"
)
_JOINED_MOBILE = re.compile(
    "07[1-9][0-9]{8}|0[67][0-9]{8}|01(?:5[0-9]|6[0-3]|7[0-9])[0-9]{7,8}|0[789]0[0-9]{8}|010[2-9][0-9]{7}|04[0-9]{8}|"
    "09[0-9]{8}"
)
_TWO_DIGIT_AREA = words("8 4,4 3,4 7 2,2,2,2 3,2,2 3,3,2 6,2 2,3,2 4,3 6")


def _national_end(scan: Scan, match: re.Match[str]) -> int:
    """End of the number, 0 if it is none: European, Asian and Australian forms with an area or mobile code."""
    end = match.end()
    while end > match.start() and not (_ends_here(scan, end) and _fits_national_form(scan.text[match.start() : end])):
        end = _shorter(scan, match.start(), end)
    more = _PAIRS.match(scan.text, end) if _PAIRS.fullmatch(scan.text, match.start() + 2, end) else None
    return end if more is None or len(more[0]) // 3 % 5 == 0 else 0  # else lottery numbers


_PAIRS = re.compile("(?:[ -][0-9]{2}(?![0-9])){0,30}")


def _fits_national_form(number: str) -> bool:
    groups = re.findall("[0-9]+", number)
    digits = "".join(groups)
    area, rest = groups[0], groups[1:]
    if not 9 <= len(digits) <= 12 or len(set(digits[-7:])) < 2 or _is_fiction(digits):
        return False
    if not rest:
        return _JOINED_MOBILE.fullmatch(digits) is not None and not _is_isbn(digits)
    if _DATE.match(number) or [len(group) for group in groups] == [3, 2, 4]:
        return False  # a social security number
    if len({len(group) for group in groups}) == 1 and len(area) > 2:
        return False  # columns
    if len({int(group) - i for i, group in enumerate(groups)}) == 1:
        return False  # 01-02-03-04-05
    if len(area) == 2:
        shape = ",".join(str(len(group)) for group in rest)
        return shape in _TWO_DIGIT_AREA and (shape != "2,2,2,2" or len(set(re.findall("[^0-9]", number))) == 1)
    if len(rest) == 1:
        return len(rest[0]) >= 5 and ("." not in number or number[0] == "(")
    return (
        all(len(group) <= 5 for group in rest[1:])
        and len(rest[0]) <= 8
        and not (rest[0][0] == "0" and rest[-1][0] == "0")
    )


def _is_fiction(digits: str) -> bool:
    return any(_FICTION.fullmatch(code + digits[1:]) for code in ("44", "33", "61", "49", "353"))


def _is_isbn(digits: str) -> bool:
    return len(digits) == 10 and sum((10 - i) * int(digit) for i, digit in enumerate(digits)) % 11 == 0


# ---- other national forms ----

_NATIONAL = re.compile(
    rf"{NOT_IN_NUMBER}(?<![A-Za-z][./])(?:"
    r"(?P<cn>(?:(?:\+|00)?86[ -]?)?1(?:3[0-9]|4[0145-9]|5[0-35-9]|6[2567]|7[0-8]|8[0-9]|9[0-35-9])"
    r"(?:(?P<gap>[ .-]?)[0-9]{4}(?P=gap)[0-9]{4}|(?P<other>[ -])[0-9]{3}(?P=other)[0-9]{5}|"
    r"[0-9](?P<third>[ -])[0-9]{3}(?P=third)[0-9]{4}))|"
    r"(?P<us>(?:1[ .-])?(?:\([2-9][0-9]{2}\)[ .-]?(?:[2-9][0-9]{2})[ .-]?[0-9]{4}|"
    r"[2-9][0-9]{2}(?P<us_gap>[.-])[2-9][0-9]{2}(?P=us_gap)[0-9]{4}"
    r"|[2-9][0-9]{2}[ /][2-9][0-9]{2}-[0-9]{4}))|"
    r"(?P<hotline>400[ -][0-9]{3}[ -][0-9]{4})|"
    r"(?P<br>\([1-9][1-9]\) ?9?[0-9]{4}[ -][0-9]{4}|[1-9][1-9] 9[0-9]{4}-[0-9]{4})|"
    r"(?P<ru>8[ -]?(?:\([3-9][0-9]{2}\)|[3-9][0-9]{2})[ -]?[0-9]{3}[ -][0-9]{2}[ -][0-9]{2})|"
    r"(?P<es>(?<![0-9] )(?:[6-9][0-9]{2} [0-9]{2} [0-9]{2} [0-9]{2}|9[1-8] [0-9]{3} [0-9]{2} [0-9]{2})(?! [0-9]))"
    r")"
)
_US_SPACED = re.compile(rf"{NOT_IN_NUMBER}1[ .-][2-9][0-9]{{2}} [2-9][0-9]{{2}} [0-9]{{4}}{NUMBER_ENDS}")

_DATE = re.compile(r"(?:19|20)[0-9]{2}[-./][0-9]{2}[-./][0-9]{2}(?![0-9])|[0-9]{2}[-./][0-9]{2}[-./](?:19|20)[0-9]{2}")
_LABELLED = re.compile(
    rf"(?<![A-Za-z0-9_+$€£¥])(?<![0-9][./:-])\(?[0-9]{{1,15}}+\)?(?:{_SEP}?\(?[0-9]{{2,10}}+\)?){{0,6}}+"
)


_COUNTED = "01234567890123456789"  # placeholders that people type
_IN_ACCOUNT = re.compile("(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}[ -](?:[A-Z0-9]{4}[ -]){1,7}$")  # an IBAN with a wrong check


def phones(scan: Scan) -> Iterator[tuple[int, int]]:
    """Spans of phone and fax numbers, with their extension."""
    for match in scan.matches(_INTERNATIONAL):
        end = _international_end(scan, match)
        if end and not _IN_ACCOUNT.search(scan.before(match.start(), 44)):
            yield _span(scan, match.start(), end)
    for match in scan.matches(_LEADING_ZERO):
        end = _national_end(scan, match)
        if end and not _is_other(scan, match.start()):
            yield _span(scan, match.start(), end)
    for pattern in (_NATIONAL, _US_SPACED):
        for match in scan.matches(pattern):
            digits = digits_of(match[0])
            fictional = _FICTION.fullmatch("1" + digits[-10:]) is not None or digits == "17179869184"  # 2**34
            end = _with_extension(scan, match.end())
            ends = end > match.end() or _ENDS.match(scan.text, end) is not None
            if ends and not fictional and len(set(digits[-8:])) > 1 and not _is_other(scan, match.start()):
                yield match.start(), end
    for match in scan.matches(_LABELLED):
        if end := _labelled(scan, match):
            yield _span(scan, match.start(), end)


def _span(scan: Scan, begin: int, end: int) -> tuple[int, int]:
    """Span with the extension, and without an opening bracket that is not closed inside."""
    return begin + (scan.text[begin] == "(" and ")" not in scan.text[begin:end]), _with_extension(scan, end)


def _with_extension(scan: Scan, end: int) -> int:
    extension = _EXTENSION.match(scan.text, end)
    return extension.end() if extension else end


def _is_other(scan: Scan, begin: int) -> bool:
    """Whether the number is part of an IBAN, or labelled as an order or serial number and not as a phone."""
    if _IN_ACCOUNT.search(scan.before(begin, 44)):
        return True
    return is_code(scan, begin) and not has_label(scan, begin)


def _labelled(scan: Scan, match: re.Match[str]) -> int:
    if len(digits_of(match[0])) < 7 or not has_label(scan, match.start()):
        return 0
    end = match.end()
    while end > match.start():
        number = scan.text[match.start() : end]
        digits = digits_of(number)
        if 7 <= len(digits) <= 13 and not _DATE.match(number) and _ends_here(scan, end):
            fictional = _FICTION.fullmatch("1" + digits[-10:]) or _is_fiction(digits) or digits in _COUNTED
            decimal = re.fullmatch("[0-9]+[.][0-9]+", number)
            local = re.fullmatch("55501[0-9]{2}", digits)  # fictional, without an area code
            return 0 if fictional or local or decimal or len(set(digits)) < 3 else end
        end = _shorter(scan, match.start(), end)
    return 0
