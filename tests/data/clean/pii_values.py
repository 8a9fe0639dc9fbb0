"""Generators of values that look like personal data: numbers with a right or wrong check digit, and templates.

Written independently of the engine's checks. All values are random: no real person's number and no usable key.
"""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Callable


def digits(draw: random.Random, n: int) -> str:
    return "".join(draw.choice("0123456789") for _ in range(n))


def letters(draw: random.Random, n: int, alphabet: str = "") -> str:
    return "".join(
        draw.choice(alphabet or "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(n)
    )


def with_luhn(body: str) -> str:
    """`body` with its Luhn check digit; independent of the engine's code."""
    total = 0
    for place, character in enumerate(reversed(body)):
        value = int(character) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return body + str(-total % 10)


def cn_id(draw: random.Random, wrong: bool = False) -> str:
    day = datetime.date(1950, 1, 1) + datetime.timedelta(draw.randrange(22000))
    body = draw.choice(("110101", "310104", "440305", "510107", "330106", "420106")) + f"{day:%Y%m%d}" + digits(draw, 3)
    remainder = sum(int(c) * pow(2, 17 - i, 11) for i, c in enumerate(body)) % 11
    check = "10X98765432"[remainder]
    return body + (draw.choice([c for c in "0123456789X" if c != check]) if wrong else check)


def _mod97(text: str) -> int:
    value = 0
    for character in text:
        for digit in str(int(character, 36)):
            value = (value * 10 + int(digit)) % 97
    return value


_IBAN_FORMS = {
    "DE": "##################", "FR": "##########§§§§§§§§§§§##", "GB": "XBNK##############", "NL": "XBNK##########",
    "ES": "####################", "IT": "X##########§§§§§§§§§§§§", "CH": "#####§§§§§§§§§§§§", "AT": "################",
    "BE": "############", "PL": "########################", "SE": "####################", "PT": "#####################",
    "NO": "###########", "DK": "##############", "SA": "##§§§§§§§§§§§§§§§§§§", "AE": "###################",
    "TR": "######################", "LU": "###§§§§§§§§§§§§§", "FI": "##############",
}  # fmt: skip


def _iban(draw: random.Random, form: str, country: str) -> str:
    body = fill(draw, _IBAN_FORMS[country])
    check = 98 - _mod97(body + country + "00")
    if form.startswith("bad"):
        check = (check + draw.randrange(1, 90)) % 97 + 1
        check = check if check != 98 - _mod97(body + country + "00") else check % 97 + 1
    value = f"{country}{check:02}{body}"
    gap = " " if form.endswith("4") else "-" if form.endswith("dash") else ""
    value = gap.join(value[i : i + 4] for i in range(0, len(value), 4)) if gap else value
    return value.lower() if form.endswith("low") else value


def _groups(value: str, sizes: tuple[int, ...], gap: str) -> str:
    parts, at = [], 0
    for size in sizes:
        parts.append(value[at : at + size])
        at += size
    return {"_": " "}.get(gap, gap).join(part for part in parts if part)


def _detax(draw: random.Random) -> str:
    body = draw.sample("0123456789", 10)
    body[draw.randrange(1, 10)] = body[0]
    if body[0] == "0":
        body = [c.translate(str.maketrans("01", "10")) for c in body]
    product = 10
    for c in body:
        rest = (product + int(c)) % 10
        product = (rest if rest else 10) * 2 % 11
    return "".join(body) + str((11 - product) % 10)


def _nir(draw: random.Random) -> str:
    number = f"{draw.choice('12')}{draw.randrange(40, 99)}{draw.randrange(1, 13):02}{draw.randrange(1, 95):02}"
    number += f"{draw.randrange(1, 990):03}{draw.randrange(1, 999):03}"
    return f"{number}{97 - int(number) % 97:02}"


def _cf(draw: random.Random) -> str:
    even = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    body = f"RSSMRA{draw.randrange(30, 99)}{draw.choice('ABCDEHLMPRST')}{draw.randrange(1, 29):02}"
    body += f"H{draw.randrange(100, 999)}"
    table = dict(zip("0123456789", (1, 0, 5, 7, 9, 13, 15, 17, 19, 21)))
    table |= dict(
        zip(
            "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
            (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23),
        )
    )
    total = sum(table[c] if i % 2 == 0 else (int(c) if c.isdigit() else even.index(c) - 10) for i, c in enumerate(body))
    return body + chr(65 + total % 26)


def _cpf(draw: random.Random) -> str:
    body = [draw.randrange(10) for _ in range(9)]
    for _ in range(2):
        total = sum(c * w for c, w in zip(body, range(len(body) + 1, 1, -1)))
        body.append(0 if total % 11 < 2 else 11 - total % 11)
    return "".join(map(str, body))


def _aadhaar(draw: random.Random) -> str:
    """A number with the check digit of Verhoeff's algorithm, by the dihedral group of order ten."""

    def times(a: int, b: int) -> int:
        rotated = (a % 5 + b % 5) % 5 if a < 5 else (a % 5 - b % 5) % 5
        return rotated + 5 * ((a >= 5) != (b >= 5))

    def turn(n: int, value: int) -> int:
        for _ in range(n):
            value = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)[value]
        return value

    body = draw.choice("23456789") + "".join(draw.choice("0123456789") for _ in range(10))
    for last in "0123456789":
        check = 0
        for place, c in enumerate(reversed(body + last)):
            check = times(check, turn(place % 8, int(c)))
        if check == 0:
            return body + last
    raise AssertionError("no digit fits")


def _numbers(draw: random.Random, name: str, how: str) -> str:
    """A value with a right (or, if name or how starts with bad, a wrong) check digit, grouped as `how` says."""
    if "iban" in name:
        return _iban(draw, name, how)
    if name in ("b64", "b64u", "hex", "w", "alpha"):
        both = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
        special = {"hex": "0123456789abcdef", "alpha": both, "b64": both + "0123456789+/"}
        alphabet = special.get(name, both + "0123456789")
        return "".join(draw.choice(alphabet) for _ in range(int(how)))
    makers: dict[str, tuple[Callable[[], str], tuple[int, ...]]] = {
        "ssn": (
            lambda: fill(draw, draw.choice(("2", "4", "5")) + "#1") + fill(draw, "3#") + fill(draw, "7##2"),
            (3, 2, 4),
        ),
        "detax": (lambda: _detax(draw), (2, 3, 3, 3)),
        "nir": (lambda: _nir(draw), (1, 2, 2, 2, 3, 3, 2)),
        "badnir": (lambda: (lambda v: v[:-2] + f"{(int(v[-2:]) + 5) % 97 + 1:02}")(_nir(draw)), (1, 2, 2, 2, 3, 3, 2)),
        "nino": (lambda: fill(draw, "JK######A"), (2, 2, 2, 2, 1)),
        "dni": (lambda: (lambda n: f"{n}{'TRWAGMYFPDXBNJZSQVHLCKE'[int(n) % 23]}")(fill(draw, "4#######")), (8, 1)),
        "nie": (lambda: (lambda n: f"X{n}{'TRWAGMYFPDXBNJZSQVHLCKE'[int(n) % 23]}")(fill(draw, "4######")), (9,)),
        "cf": (lambda: _cf(draw), (16,)),
        "ahv": (
            lambda: (lambda b: b + str(-sum(int(c) * (1, 3)[i % 2] for i, c in enumerate(b)) % 10))(
                fill(draw, "756#########")
            ),
            (3, 4, 4, 2),
        ),
        "cpf": (lambda: _cpf(draw), (3, 3, 3, 2)),
        "rrn": (lambda: fill(draw, "8#0#1#-1######"), (14,)),
        "aadhaar": (lambda: _aadhaar(draw), (4, 4, 4)),
        "visa": (lambda: with_luhn(fill(draw, "45#############")), (4, 4, 4, 4)),
        "mc": (lambda: with_luhn(fill(draw, "53#############")), (4, 4, 4, 4)),
        "union": (lambda: with_luhn(fill(draw, "6222##############")), (4, 4, 4, 4, 3)),
        "amex": (lambda: with_luhn(fill(draw, "37############")), (4, 6, 5)),
        "cnid": (lambda: cn_id(draw), (6, 8, 4)),
    }
    make, sizes = makers[name]
    value = make()
    if how == "full":
        return value.translate({48 + i: 0xFF10 + i for i in range(10)})
    if how == "6":
        return _groups(value, (6, 13), "_")
    if name == "cpf" and how == ".":
        return f"{_groups(value[:9], (3, 3, 3), '.')}-{value[9:]}"
    return _groups(value, sizes, how) if how else value


def fill(draw: random.Random, form: str) -> str:
    """Replace the placeholders of a template by random values."""
    form = re.sub(r"<(?!at>)(\w+) ?([^>]*)>", lambda m: _numbers(draw, m[1], m[2]), form)
    alphabets = {
        "#": "0123456789",
        "¤": "0123456789abcdef",
        "¿": "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789",
        "§": "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567",
    }
    return re.sub("(?<!&)#|[¤¿§]", lambda match: draw.choice(alphabets[match[0]]), form)
