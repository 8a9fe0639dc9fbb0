"""Numbers with check digits: bank cards, IBAN, Chinese identity numbers, and US social security numbers."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator

from engine.data.clean.pii.scan import Scan, words

# Before a number: no letter, digit or currency sign; no digit with a decimal point or a hyphen.
NOT_IN_NUMBER = r"(?<![A-Za-z0-9_#$€£¥])(?<![0-9][.:-])(?:(?<![0-9]/)|(?<=[0-9]{7}/))(?<![A-Za-z]-)(?<![^0-9]0,)"
NUMBER_ENDS = r"(?![A-Za-z0-9_%*^]|[.:-][0-9]|/[0-9](?![0-9 -]{6}))"

_BEFORE_CODE = re.compile(
    r"(?:(?:\b|_)(?i:orders?|tracking|invoices?|tickets?|receipts?|transactions?|txn|trx|batch|lot|parts?|item|"
    r"articles?|serials?|s/n|sn|"
    r"sku|model|mpn|steps?|iter(?:ation)?|epoch|tokens?|samples?|rows?|records?|steuernummer|st\.?-?nr|best\.?-?|"
    r"catalog(?:ue)?|product|imei|meid|iccid|imsi|isbn(?:-1[03])?|issn|upc|ean|gtin|asin|barcode|timestamp|epoch|ts|"
    r"time|case|docket|patent|fips|codes?|lott?o(?:zahlen)?|lottery|tirage|loterie|num[ée]ros|keno|insee|cas|doi|pmid|"
    r"arxiv|oclc|lccn|ref(?:erence)?|parcel|shipment|consignment|booking|reservation|"
    r"pnr|"
    r"flight|build|version|id|uid|uuid|guid|pid|tid|seed|checksum|crc|hash|offset|size|bytes|count|total|sum|amount|"
    r"price|policy|claim|contract|vin|zip|p/n|confirmation|permit|registration|licen[cs]e|postcode|siren|siret|tva|"
    r"vat|ust-?id(?:nr)?|hrb|blz|konto(?:nummer|-?nr)?|"
    r"kto|"
    r"bestell(?:ung|nummer|-?nr)|auftrags?(?:nummer|-?nr)?|rechnungs?(?:nummer|-?nr)?|kunden(?:nummer|-?nr)|"
    r"sendungs?(?:nummer|-?nr)?|"
    r"artikel(?:nummer|-?nr)?|serien(?:nummer|-?nr)|vorgangs?(?:nummer|-?nr)?|vertrags?(?:nummer|-?nr)?|aktenzeichen|"
    r"az|"
    r"materialnummer|teile(?:nummer|-?nr)|chargen?-?(?:nummer|nr)|losnummer|beleg(?:nummer|-?nr)?|zeitstempel|"
    r"commande|facture|r[ée]f(?:[ée]rence)?|colis|suivi|dossier|s[ée]rie|article|lot|pi[èe]ce|contrat|"
    r"pedido|factura|env[íi]o|expediente|referencia|serie|art[íi]culo|lote|seguimiento|contrato|"
    r"ordine|fattura|spedizione|pratica|matricola|codice|qq)|(?<=[a-z])I[dD]|[#§]|"
    r"订单|单号|运单|快递|流水|编号|序列号|条码|时间戳|彩票|批号|货号|工单|合同|发票|税号|型号|学号|工号|交易号|物流|"
    r"案号|"
    r"版本)"
    r"(?:[ _-]{0,2}(?i:numbers?|nummer|num|no|nr|code|ref|ids?|n[°º]|n[úu]mero|num[ée]ro|号码?|号))?[ \t]{0,2}"
    r"(?:\(.{0,12}\))?[.\"'\]]{0,2}[ \t]{0,2}(?:is|was|ist|lautet|est|es|with|für|为|是)?[ \t:：=#|>\"'(]{0,4}$"
)


def is_code(scan: Scan, begin: int) -> bool:
    """Whether the words before label the number as an order, a serial number, a timestamp or the like."""
    return _BEFORE_CODE.search(scan.before(begin, 40)) is not None


def digits_of(text: str) -> str:
    """The digits of a text, without separators."""
    return re.sub("[^0-9]", "", text)


# ---- Chinese identity numbers ----

_NOT_IN_ID = NOT_IN_NUMBER.replace("0-9_", "0-9")  # in file names it may be between _
_CN_ID = re.compile(
    rf"{_NOT_IN_ID}[1-8][0-9]{{5}}(?P<gap>[ -]?)(?:[0-9]{{8}}(?P=gap)|"
    rf"[0-9]{{4}} [0-9]{{4}} )[0-9]{{3}}[0-9Xx](?![A-Za-z0-9]|[.-][0-9])"
)
_PROVINCES = words(
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 82 83"
)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def cn_ids(scan: Scan) -> Iterator[tuple[int, int]]:
    """Spans of Chinese identity numbers, joined or grouped 6-8-4."""
    for match in scan.matches(_CN_ID):
        if is_cn_id(re.sub("[ -]", "", match[0])):
            yield match.span()


def is_cn_id(value: str) -> bool:
    """Whether province, birth date and check digit (GB 11643, ISO 7064 mod 11-2) of an 18-character ID are valid."""
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, value))
    if value[:2] not in _PROVINCES or "10X98765432"[total % 11] != value[17].upper():
        return False
    return is_date(value[6:14])


def is_date(digits: str) -> bool:
    """Whether YYYYMMDD is a day on which a living person may have been born."""
    try:
        return 1880 <= datetime.date(int(digits[:4]), int(digits[4:6]), int(digits[6:8])).year <= 2100
    except ValueError:
        return False


# ---- bank cards ----

_CARD = re.compile(
    rf"{NOT_IN_NUMBER}(?<!\+)[2-6](?:[0-9]{{11,18}}(?![0-9])|"
    rf"[0-9]{{3,5}}(?P<gap>[ .-])[0-9]{{4,13}}(?:(?P=gap)[0-9]{{4,5}}){{0,3}}(?:(?P=gap)[0-9]{{1,3}})?)"
    r"(?![A-Za-z0-9_]|[.-][0-9])"
)
_TEST_CARDS = words(  # of payment services
    "4111111111111111 4242424242424242 4012888888881881 4222222222222 5555555555554444 5105105105105100 "
    "378282246310005 371449635398431 378734493671000 6011111111111117 6011000990139424 30569309025904 "
    "38520000023237 3530111333300000 3566002020360505 4000056655665556 5200828282828210 2223003122003222 "
    "6200000000000005 4000002500003155"
)
_CARD_WORD = re.compile(r"(?i:visa|cards?|karten?|carte|tarjeta|carta|卡)[^\n]{0,24}$")
_MAESTRO = words("5018 5020 5038 5893 6304 6759 6761 6762 6763")


def cards(scan: Scan) -> Iterator[tuple[int, int]]:
    """Spans of payment card numbers."""
    for match in scan.matches(_CARD):
        digits = digits_of(match[0])
        if not is_card(digits) or digits in _TEST_CARDS or is_code(scan, match.start()):
            continue
        if len(digits) > 13 or _CARD_WORD.search(scan.before(match.start(), 40)):  # 13 digits are no longer issued
            yield match.span()


def is_card(digits: str) -> bool:
    """Whether issuer prefix, length and Luhn check digit are valid."""
    first, n = int(digits[:4]), len(digits)
    issued = (
        (digits[0] == "4" and n in (13, 16, 19))  # Visa
        or ((5100 <= first <= 5599 or 2221 <= first <= 2720) and n == 16)  # Mastercard
        or (digits[:2] in ("34", "37") and n == 15)  # American Express
        or ((first == 6011 or 6440 <= first <= 6599) and 16 <= n <= 19)  # Discover
        or (digits[:2] == "62" and 16 <= n <= 19)  # UnionPay
        or (3528 <= first <= 3589 and 16 <= n <= 19)  # JCB
        or ((3000 <= first <= 3059 or digits[:2] in ("36", "38", "39")) and n == 14)  # Diners
        or (2200 <= first <= 2204 and n == 16)  # Mir
        or (digits[:4] in _MAESTRO and 12 <= n <= 19)
    )
    return issued and luhn(digits) and len(set(digits)) > 2


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(int(digit) for digit in digits[-1::-2]) + sum(doubled)) % 10 == 0


# ---- IBAN ----

_LENGTHS = words(
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
    "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
    "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
    "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
    "YE30"
)
_IBAN_LENGTH = {entry[:2]: int(entry[2:]) for entry in _LENGTHS}
_IBAN_LOW = re.compile(r"(?<![A-Za-z0-9_])[a-z]{2}[0-9]{2} ?[a-z0-9]{2}")


def ibans(scan: Scan) -> Iterator[tuple[int, int]]:
    """Spans of IBANs (ISO 13616): the country's length, and remainder 1 mod 97."""
    last = 0
    for at in scan.capital_pairs:
        inside = re.search(r"(?<!IBAN)(?<=[A-Za-z0-9_])$", scan.before(at, 4))
        end = 0 if inside or at < last else _iban_end(scan.text, at)
        if end:
            yield at, end
            last = end
    for match in scan.matches(_IBAN_LOW):
        end = _iban_end(scan.text, match.start())
        is_labelled = "iban" in scan.before(match.start(), 40).lower()
        no_lower_case = not re.search("[a-z]", scan.text[match.start() + 2 : end])  # not words of a hex dump
        if end and (is_labelled or no_lower_case):
            yield match.start(), end


_GAPS = " .-"


def _iban_end(text: str, begin: int) -> int:
    """End of the IBAN that begins here, 0 if there is none."""
    length = _IBAN_LENGTH.get(text[begin : begin + 2].upper(), 0)
    value, at, gaps = "", begin, 0
    while len(value) < length and at < len(text):
        character = text[at]
        if character.isascii() and character.isalnum():
            value, gaps = value + character.upper(), 0
        elif character in _GAPS and not gaps:
            gaps = 1
        else:
            return 0
        at += 1
    if not length or len(value) < length or re.match("[A-Za-z0-9_]", text[at : at + 1]):
        return 0
    if value.isalpha() or sum(c.isdigit() for c in value) < 6 or len(set(value[4:])) < 3:
        return 0
    return at if int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1 else 0


# ---- US social security numbers ----

_SSN = re.compile(
    r"(?<![A-Za-z0-9_$€£¥])(?<![0-9][.:/-])(?!000|666|9)[0-9]{3}(?P<gap>[ .-]?)(?!00)[0-9]{2}(?P=gap)(?!0000)[0-9]{4}"
    + NUMBER_ENDS
)
_SSN_WORD = re.compile(
    r"(?i:(?:\b|_)ssn?s?(?:\b|_)|social[ _-]?sec(?:urity|\.)?|\bsoc\.? ?sec\b|\bsocial\b|tax(?:[ -]?payer)?[ -]?id|"
    r"\btin\b|"
    r"社会安全号码?|社保号)[^\n]{0,32}(?:\n[ \t]{0,4})?$|(?i:ssn)[\"']?[ :=,#-]{0,3}[\"']?$"
)
_SSN_AFTER = re.compile(r"[ )\"',;]{0,3}[(\[]?(?i:ssn|social security)")
_ACCOUNT = re.compile(r"(?i:\b(?:accounts?|acct|a/c|member|loan)\b[^\n0-9]{0,12}$)")
# Printed on wallets, forms and advertisements.
_PLACEHOLDER_SSNS = words("123456789 078051120 219099999 111223333 123121234 457555462")


def us_ssns(scan: Scan) -> Iterator[tuple[int, int]]:
    """Spans of SSNs: 3-2-4 with hyphens; other separators or none count only next to a word for SSN."""
    for match in scan.matches(_SSN):
        digits = digits_of(match[0])
        if len(set(digits)) < 3 or digits in _PLACEHOLDER_SSNS:
            continue
        before, heading = scan.before(match.start(), 56), scan.heading(match.start())
        is_labelled = _SSN_WORD.search(before) or _SSN_WORD.search(heading) or _SSN_AFTER.match(scan.text, match.end())
        other = is_code(scan, match.start()) or _ACCOUNT.search(scan.before(match.start(), 32))
        if is_labelled or (match["gap"] == "-" and not other):
            yield match.span()
