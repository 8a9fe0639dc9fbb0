"""Identity, tax and insurance numbers of nine countries, each with its check."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from engine.data.clean.pii.numbers import NOT_IN_NUMBER, is_code, is_date
from engine.data.clean.pii.scan import Scan

_ENDS = r"(?![A-Za-z0-9_]|[.,/-][0-9])"


def _de_tax_id(value: str) -> bool:
    """Steuer-Identifikationsnummer: one of the first ten digits occurs two or three times; ISO 7064 mod 11-10."""
    counts = sorted(value[:10].count(digit) for digit in set(value[:10]))
    if value[0] == "0" or counts[-1] not in (2, 3) or len(counts) < 8 or (len(counts) > 1 and counts[-2] > 1):
        return False
    product = 10
    for digit in value[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(value[10])


def _fr_nir(value: str) -> bool:
    """Numéro de sécurité sociale: sex, month, department, and a key of 97 minus the remainder mod 97."""
    month, department = int(value[3:5]), value[5:7]
    if not (1 <= month <= 12 or 20 <= month <= 42 or month >= 50) or department == "00":
        return False
    number = int(value[:13].replace("2A", "19").replace("2B", "18"))
    return 97 - number % 97 == int(value[13:])


def _uk_nino(value: str) -> bool:
    """National Insurance number: an allocated prefix; it has no check digit."""
    prefix = value[:2]
    return (
        not set(prefix) & set("DFIQUV")
        and prefix[1] != "O"
        and prefix not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")
    )


def _es_dni(value: str) -> bool:
    """DNI and NIE: the check letter is the remainder mod 23."""
    number = value[:-1].replace("X", "0", 1).replace("Y", "1", 1).replace("Z", "2", 1)
    return number.isdigit() and len(set(number)) > 1 and "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == value[-1]


_ODD_VALUES = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
_ODD = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", _ODD_VALUES)) | dict(zip("0123456789", _ODD_VALUES))


def _it_fiscal_code(value: str) -> bool:
    """Codice fiscale: the check letter is a weighted sum mod 26."""
    even = sum(int(c) if c.isdigit() else ord(c) - 65 for c in value[1:15:2])
    return (even + sum(_ODD[c] for c in value[0:15:2])) % 26 == ord(value[15]) - 65


def _ch_ahv(value: str) -> bool:
    """AHV number: the check digit of EAN-13."""
    return sum(int(c) * (3 if i % 2 else 1) for i, c in enumerate(value)) % 10 == 0


def _br_cpf(value: str) -> bool:
    """CPF: two check digits mod 11."""
    if len(set(value)) == 1:
        return False
    for n in (9, 10):
        if sum(int(c) * (n + 1 - i) for i, c in enumerate(value[:n])) * 10 % 11 % 10 != int(value[n]):
            return False
    return True


def _kr_rrn(value: str) -> bool:
    """Resident registration number: birth date and century digit; since 2020 without a check digit."""
    century = {"1": "19", "2": "19", "3": "20", "4": "20", "5": "19", "6": "19", "7": "20", "8": "20"}.get(value[6])
    return century is not None and is_date(century + value[:6])


_DIHEDRAL = [[(j + i) % 5 if j < 5 and i < 5 else 0 for i in range(10)] for j in range(10)]
for _j in range(10):
    for _i in range(10):
        flip, turn = _j >= 5, _i >= 5
        _DIHEDRAL[_j][_i] = ((_j - _i if flip else _j + _i) % 5) + (5 if flip != turn else 0)
_PERMUTATIONS = [list(range(10)), [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]]
while len(_PERMUTATIONS) < 8:
    _PERMUTATIONS.append([_PERMUTATIONS[-1][_PERMUTATIONS[1][i]] for i in range(10)])


def _in_aadhaar(value: str) -> bool:
    """Aadhaar: the check digit of Verhoeff's algorithm."""
    check = 0
    for position, digit in enumerate(reversed(value)):
        check = _DIHEDRAL[check][_PERMUTATIONS[position % 8][int(digit)]]
    return check == 0


# (pattern, check, words required before the bare form). A pattern with a group `bare` matches the usual separators, or,
# in that group, the digits without them; the bare form counts only after one of the words.
_FORMS: tuple[tuple[re.Pattern[str], Callable[[str], bool], str], ...] = (
    (
        re.compile(
            rf"{NOT_IN_NUMBER}(?:(?<![0-9] )[1-9][0-9] [0-9]{{3}} [0-9]{{3}} [0-9]{{3}}(?! [0-9])|"
            rf"(?P<bare>[1-9][0-9]{{10}})){_ENDS}"
        ),
        _de_tax_id,
        r"steuer|\bid-?nr|identifikationsn|\bident-?n|\btin\b|\btax",
    ),
    (
        re.compile(
            rf"{NOT_IN_NUMBER}(?:[12378](?P<gap>[ .-])[0-9]{{2}}(?P=gap)[0-9]{{2}}(?P=gap)(?:[0-9]{{2}}|2[AB])(?P=gap)"
            rf"[0-9]{{3}}(?P=gap)[0-9]{{3}}(?P=gap)[0-9]{{2}}|"
            rf"(?P<bare>[12378][0-9]{{4}}(?:[0-9]{{2}}|2[AB])[0-9]{{6}} ?[0-9]{{2}})){_ENDS}"
        ),
        _fr_nir,
        r"s[ée]cu|\bnir\b|insee|\bnss\b|assur|social|vitale|\bss\b|immatric",
    ),
    (
        re.compile(
            rf"{NOT_IN_NUMBER}(?:[0-9]{{8}}[ -]?|[0-9]{{2}}\.[0-9]{{3}}\.[0-9]{{3}}[ -]?)[A-Z](?![A-Za-z0-9_-])"
            r"|(?<![A-Za-z0-9_-])[XYZ][ -]?[0-9]{7}[ -]?[A-Z](?![A-Za-z0-9_-])"
        ),
        _es_dni,
        "",
    ),
    (
        re.compile(rf"{NOT_IN_NUMBER}756(?P<gap>[. -]?)[0-9]{{4}}(?P=gap)[0-9]{{4}}(?P=gap)[0-9]{{2}}{_ENDS}"),
        _ch_ahv,
        "",
    ),
    (
        re.compile(rf"{NOT_IN_NUMBER}(?:[0-9]{{3}}\.[0-9]{{3}}\.[0-9]{{3}}-[0-9]{{2}}|(?P<bare>[0-9]{{11}})){_ENDS}"),
        _br_cpf,
        r"\bcpf",
    ),
    (re.compile(rf"{NOT_IN_NUMBER}[0-9]{{6}}-[1-8][0-9]{{6}}{_ENDS}"), _kr_rrn, ""),
    (
        re.compile(rf"{NOT_IN_NUMBER}(?P<bare>[2-9][0-9]{{3}}(?P<gap>[ -]?)[0-9]{{4}}(?P=gap)[0-9]{{4}}){_ENDS}"),
        _in_aadhaar,
        r"aadh?aa?r|uidai|आधार",
    ),
)
_INSURANCE = r"national ins|\bni\b|\bnino?\b|n\.i\."
_NINO = re.compile(r"[A-Z]{2}(?P<gap>[ -]?)(?:[0-9]{2}(?P=gap)){3}[A-D](?![A-Za-z0-9_-])")
_FISCAL_CODE = re.compile(
    r"[A-Z]{3}( ?)[A-Z]{3}\1[0-9]{2}[ABCDEHLMPRST][0-9LMNPQRSTUV]{2}\1[A-Z][0-9LMNPQRSTUV]{3}[A-Z](?![A-Za-z0-9_-])"
)


def national_ids(scan: Scan) -> Iterator[tuple[int, int]]:
    """Spans of identity numbers of DE, FR, GB, ES, IT, CH, BR, KR and IN."""
    for form, check, words in _FORMS:
        for match in scan.matches(form):
            if not check(re.sub("[ .-]", "", match[0])):
                continue
            bare = "bare" in form.groupindex and match["bare"] is not None
            is_labelled = bool(words) and _has_label_nearby(scan, words, match.start())
            if is_labelled or not (bare or is_code(scan, match.start())):
                yield match.span()
    for at in scan.capital_pairs:
        for form, begin, check in (
            (_NINO, at, _uk_nino),
            (_FISCAL_CODE, at - 4, _it_fiscal_code),
            (_FISCAL_CODE, at - 5, _it_fiscal_code),
        ):
            hit = form.match(scan.text, begin) if begin >= 0 else None
            inside = re.match("[A-Za-z0-9_-]", scan.before(begin, 1))
            if not hit or inside or not check(re.sub("[ -]", "", hit[0])):
                continue
            if not is_code(scan, begin) or _has_label_nearby(scan, _INSURANCE, begin):
                yield hit.span()


def _has_label_nearby(scan: Scan, words: str, begin: int) -> bool:
    """Whether one of the words occurs before the number, or in the heading of its table column."""
    before, heading = scan.before(begin, 60), scan.heading(begin)
    return (
        re.search(rf"(?i:{words})[^\n]{{0,30}}$", before) is not None or re.search(f"(?i:{words})", heading) is not None
    )
