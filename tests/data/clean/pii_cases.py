"""Labelled development set for the rules of engine/data/clean/pii, and their precision and recall.

`python -m tests.data.clean.pii_cases` prints these (with `a`, `b`, `c`, `d`: on a set of tests/data/clean/pii_heldout).

A line is a text in which [[kind|value]] marks each expected finding; any other finding is wrong. Half of the lines have
none: version numbers, timestamps, ISBNs, order numbers, digests, ids with a wrong check digit. Some positives are
obfuscated, as people do to evade rules; some of those are missed, and they stay in the set.

Values are drawn with a fixed seed, so that this file contains no real person's number and no usable key.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.data.clean.pii import KINDS, find
from tests.data.clean.pii_development import lines
from tests.data.clean.pii_values import cn_id, digits, letters, with_luhn

_MARK = re.compile(r"\[\[(\w+)\|(.*?)\]\]", re.S)


@dataclass(frozen=True)
class Case:
    """A text, and (kind, begin, end) of each expected finding."""

    text: str
    spans: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, marked: str) -> Case:
        text, spans, position = "", [], 0
        for match in _MARK.finditer(marked):
            text += marked[position : match.start()]
            spans.append((match[1], len(text), len(text) + len(match[2])))
            text, position = text + match[2], match.end()
        return cls(text + marked[position:], tuple(spans))


@dataclass(frozen=True)
class Score:
    """Counts of one kind. A finding is right if it overlaps a labelled span of the same kind."""

    labelled: int
    found: int
    right: int  # labelled spans that were found
    wrong: int  # findings without a labelled span

    @property
    def precision(self) -> float:
        return (self.found - self.wrong) / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.labelled if self.labelled else 1.0


def mobile(draw: random.Random) -> str:
    return draw.choice(("139", "138", "150", "186", "177", "199", "135", "159")) + digits(draw, 8)


def public_ip(draw: random.Random) -> str:
    first = draw.choice((23, 45, 52, 81, 93, 114, 121, 139, 185, 203, 218))
    return ".".join(map(str, (first, draw.randrange(1, 250), draw.randrange(30, 250), draw.randrange(1, 250))))


NAMES = ("maria.silva", "j.o'neill".replace("'", ""), "wang_xm88", "tom", "a.kowalski+news", "li.na2001", "o_brien-7")
DOMAINS = ("gmail.com", "uni-koeln.de", "mail.tsinghua.edu.cn", "qq.com", "corp.acme.co.uk", "proton.me", "yandex.ru")


def emails(draw: random.Random) -> Iterator[str]:
    frames = (
        "Contact me at {}.",
        "From: Maria <{}>",
        "邮箱是{}，请来信。",
        "mailto:{}",
        "Email:{}",
        '<a href="mailto:{}">write</a>',
        "({}; she/her)",
        "user,{},2021-04-01",
        '{{"email": "{}"}}',
        "cc {}, thanks",
        "Author: x <{}>\nDate: Mon",
        "{}\n",
        "联系人：{}",
        "He signed as {}!",
    )
    for frame in frames:
        for _ in range(3):
            yield frame.format(f"[[email|{draw.choice(NAMES)}@{draw.choice(DOMAINS)}]]")
    yield "write to [[email|jane dot doe at gmail dot com]]"
    yield "write to [[email|jane [at] posteo [dot] de]]"
    yield "[[email|J.Doe@UNI-BONN.DE]] in capitals"
    yield "[[email|müller@web.de]] with an umlaut"
    yield from (
        "git clone git@github.com:org/repo.git",
        "npm install lodash@4.17.21 @types/node@18.0.0",
        "attn = softmax(q@k.transpose(-2, -1))",
        "y = x@w.T + b",
        "y = x@w.to(device)",
        "icons: logo@2x.png and logo@3x.jpg",
        "@pytest.mark.parametrize('x', [1])",
        "follow @acme.io on the site",
        "ssh root@localhost",
        "user@example.com is what manuals write",
        "set me@mail.example.org in the config",
        "deploy@server01 rebooted",
        "a@b is no address",
        "3 apples @ 2.50 each",
        "return self@other.matrix",
        "mongodb://app:pass@db.internal:27017/x",
        "x = A@B.inverse() @ c",
        "foo@bar..com is malformed",
    )


def ips(draw: random.Random) -> Iterator[str]:
    frames = (
        "Client {} connected",
        '{} - - [10/Oct/2023:13:55:36 +0000] "GET / HTTP/1.1" 200',
        "登录IP：{}，时间昨天",
        "http://{}:8080/index.html",
        "host={};port=22",
        "banned ({})",
        "ping {}",
        "from {} to",
        "ip: {}.",
        "X-Forwarded-For: {}, 10.0.0.1",
    )
    for frame in frames:
        for _ in range(3):
            yield frame.format(f"[[ip|{public_ip(draw)}]]")
    for address in ("2a02:8109:9a80:1b40:5c3d:2f:9e1a:77", "2001:4860:4860::8844", "2400:3200:baba::1"):
        yield f"peer [[ip|{address}]] up"
        yield f"connect to [[[ip|{address}]]]:443"
    yield "address [[ip|81.92.17(dot)4]]"
    yield from (
        "version 1.2.3.4 is out",
        "Version: 14.21.3.9",
        "upgrade to 23.45.67.89 first",
        "v2.13.0.1",
        "Chrome/120.0.0.0 Safari/537.36",
        "gateway 192.168.1.1, dns 10.0.0.53",
        "listens on 127.0.0.1:8000",
        "bind 0.0.0.0",
        "netmask 255.255.255.0",
        "docs use 192.0.2.17 and 203.0.113.9",
        "build 10.0.19041.1415",
        "OID 1.3.6.1.4.1.311",
        "2.1.3.4 Installing the package\n",
        "see section 4.3.2.1 below",
        "numpy==23.4.5.6",
        "lib-23.4.5.6.tar.gz",
        "foo_23.45.67.89",
        "300.1.2.3 is none",
        "01.02.03.04 has zeros",
        "MAC 00:1a:2b:3c:4d:5e",
        "at 12:34:56 and 23:59:59.123",
        "std::vector<int> a::b",
        "IPv6 docs 2001:db8::1",
        "link fe80::1 and ::1",
        "版本 23.45.67.89 发布",
        "固件版本：11.22.33.44",
        "ratio 1:2:3",
        "multicast group 224.0.0.251",
        "第 1.2.3.4 节",
    )


def phones(draw: random.Random) -> Iterator[str]:
    frames = (
        "手机号{}",
        "请拨打 {} 联系",
        "电话：{}，张先生",
        "call {} now",
        "{}\n",
        "微信同号:{}",
        "({})",
        "tel {}.",
    )
    for frame in frames:
        number = mobile(draw)
        for shape in (
            number,
            f"{number[:3]}-{number[3:7]}-{number[7:]}",
            f"+86 {number}",
            f"{number[:3]} {number[3:7]} {number[7:]}",
        ):
            yield frame.format(f"[[phone|{shape}]]")
    for shape in ("010-6{}", "021-5{}", "(0755) 2{}", "0571-8{}"):
        yield "座机 [[phone|" + shape.format(digits(draw, 7)) + "]] 转 3"
    for shape in ("({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "+1 {} {} {}", "1-{}-{}-{}", "+1-{}-{}-{}"):
        for frame in ("Call {} today", "phone: {}", "{} (home)"):
            area, exchange = draw.choice(("212", "415", "646", "305")), draw.choice(("436", "782", "923"))
            yield frame.format(f"[[phone|{shape.format(area, exchange, digits(draw, 4))}]]")
    for number in ("+44 20 7946 3817", "+49 30 9018 2247", "+33 6 12 48 90 37", "+91 98200 41763", "+81-3-5210-8846"):
        yield f"reach us on [[phone|{number}]]"
        yield f"Fax [[phone|{number.replace(' ', '')}]], reception"
    yield "Phone: [[phone|030 90182247]]"
    yield "Tel. [[phone|020 7946 3817]]"
    yield "his number is [[phone|one three nine 5512 8810 7]]"
    yield "加我 [[phone|一三九五五一二八八一零]]"
    yield "号码[[phone|139 5512 88107]]"
    yield from (
        "订单号13812345679已发货",
        "order 13912345670 shipped",
        "Order ID: 15012348888",
        "运单：18612340000",
        "created_at 1700000000",
        "ts=1700000000123",
        "timestamp 1712345678901",
        "ratio 0.13812345678",
        "3.13812345678e9",
        "UUID 13812345-6789-4abc-8def-0123456789ab",
        "sha1 13812345678abcdef01234567890abcdef012345",
        "call 555-0123 as in films",
        "(212) 555-0147 is fictional",
        "+1 212 555 0199 too",
        "2024-05-12 10:22:33",
        "2024-05-12T00:00:00+0800",
        "pages 123-456, 789-1011",
        "@@ -1200,12345678 +1200,87654321 @@",
        "score +10000 points",
        "ISBN 978-7-302-51160-5",
        "ISSN 1000-9825",
        "line 212-436 of file",
        "12812345678 has no such prefix",
        "11012345678",
        "ticket 415-782-9923",
        "part no. 646-923-1187",
        "serial 13600001111",
        "身份证号 12345",
        "100-200-3000",
        "range 1-800 and 2-900",
        "x = 15912345678901234",
        "$13912345678 in debt",
        "13,912,345,678 people",
        "1391234567 is one short",
        "编号：17712345678",
        "id=13812345670",
        "zip 94105-1234",
        "coordinates +37.77493, -122.41942",
        "tel aviv 2019",
        "in 1998-1999-2000",
        "offset +35236450.6 seconds",
    )


def cn_ids(draw: random.Random) -> Iterator[str]:
    frames = (
        "身份证号：{}",
        "身份证{}，男",
        "id card {} valid",
        "{}",
        "证件号码 {}。",
        '"idcard":"{}"',
        "姓名：王伟 {} 北京",
        "(公民身份号码{})",
    )
    for frame in frames:
        for _ in range(4):
            yield frame.format(f"[[cn_id|{cn_id(draw)}]]")
        yield frame.format(cn_id(draw, wrong=True))
        yield frame.format(cn_id(draw, wrong=True))
    number = cn_id(draw)
    yield f"lower case [[cn_id|{'11010119900307765x' if False else number.lower()}]]"
    yield f"spaced [[cn_id|{number[:6]} {number[6:14]} {number[14:]}]]"
    yield "流水 110101199013301234"
    yield "990101199003071234 has no such province"
    yield "id 11010119900307123"
    yield "0x110101199003071234"
    yield "hash 1101011990030712345678"
    yield "价格 110101.199003071234"
    yield "20231105123456789012"


def cards(draw: random.Random) -> Iterator[str]:
    frames = (
        "card {} exp 09/27",
        "卡号：{}",
        "请转账到 {} 户名李雷",
        "VISA {}.",
        '"pan": "{}"',
        "{}",
        "工商银行 {}",
    )
    for frame in frames:
        for prefix, n in (("4", 16), ("53", 16), ("6222", 19), ("6217", 16), ("37", 15)):
            plain = with_luhn(prefix + digits(draw, n - 1 - len(prefix)))
            grouped = (
                " ".join(plain[i : i + 4] for i in range(0, n, 4))
                if n != 15
                else f"{plain[:4]} {plain[4:10]} {plain[10:]}"
            )
            yield frame.format(f"[[bank_card|{draw.choice((plain, grouped))}]]")
    plain = with_luhn("4" + digits(draw, 14))
    yield f"[[bank_card|{'-'.join(plain[i : i + 4] for i in range(0, 16, 4))}]] with dashes"
    yield f"[[bank_card|{'.'.join(plain[i : i + 4] for i in range(0, 16, 4))}]] with dots"
    yield f"order [[bank_card|{plain}]] was the card, oddly labelled"
    for prefix, n in (("4", 16), ("53", 16), ("6222", 19), ("37", 15)):
        good = with_luhn(prefix + digits(draw, n - 1 - len(prefix)))
        bad = good[:-1] + str((int(good[-1]) + draw.randrange(1, 10)) % 10)
        yield f"card {bad} fails Luhn"
        yield f"卡号 {bad}"
        yield f"order number {good}"
        yield f"订单号：{good}"
        yield f"sku {good}"
        yield f"digest ab{good}cd"
        yield f"0.{good}"
    for body in ("35693803564380", "86792803456712", "49015420323751"):
        yield f"IMEI {with_luhn(body)}"
        yield f"device {with_luhn(body)} online"
    yield f"ICCID {with_luhn('898600' + digits(draw, 12))}"
    yield f"shipment {with_luhn('94001' + digits(draw, 14))}"
    yield f"parcel {with_luhn('1' + digits(draw, 14))}"
    yield f"SIN {with_luhn(digits(draw, 8))}"
    yield "test card 4242 4242 4242 4242"
    yield "use 4111111111111111 in the sandbox"
    yield "0000 0000 0000 0000"
    yield "4444444444444448 is a filler"
    yield "ISBN 9787302511605"
    yield "epoch_ns 1712345678901234567"


def api_keys(draw: random.Random) -> Iterator[str]:
    upper, low = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "abcdef0123456789"
    values = (
        "AKIA" + letters(draw, 16, upper),
        "ghp_" + letters(draw, 36),
        "github_pat_" + letters(draw, 22) + "_" + letters(draw, 59),
        "glpat-" + letters(draw, 20),
        "sk-" + letters(draw, 48),
        "sk-proj-" + letters(draw, 40) + "_" + letters(draw, 20),
        "sk-ant-api03-" + letters(draw, 80) + "AA",
        "hf_" + letters(draw, 34),
        "AIza" + letters(draw, 35),
        "xoxb-" + digits(draw, 12) + "-" + digits(draw, 12) + "-" + letters(draw, 24),
        "sk_" + "live_" + letters(draw, 24),
        "npm_" + letters(draw, 36),
        "SG." + letters(draw, 22) + "." + letters(draw, 43),
        "LTAI" + letters(draw, 20),
        "AKID" + letters(draw, 32),
        digits(draw, 9) + ":AA" + letters(draw, 33),
        "eyJ" + letters(draw, 33) + ".eyJ" + letters(draw, 80) + "." + letters(draw, 43),
        "pypi-AgEI" + letters(draw, 120),
    )
    for value in values:
        yield f"export KEY=[[api_key|{value}]]"
        yield f'client = Client("[[api_key|{value}]]")'
    for name in ("api_key", "SECRET_KEY", "auth_token", "password", "client-secret", "aws_secret_access_key"):
        yield f'{name} = "[[api_key|{letters(draw, 32)}]]"'
        yield f'"{name}": "[[api_key|{letters(draw, 40, low)}]]",'
    body = "\n".join(letters(draw, 64) for _ in range(4))
    for kind in ("RSA PRIVATE KEY", "PRIVATE KEY", "OPENSSH PRIVATE KEY"):
        yield f"key:\n[[api_key|-----BEGIN {kind}-----\n{body}\n-----END {kind}-----]]\n"
    yield "password: [[api_key|hunter2]]"
    yield "the token is [[api_key|" + letters(draw, 32) + "]]"
    yield from (
        'api_key = "YOUR_API_KEY_HERE_12345"',
        'api_key = "xxxxxxxxxxxxxxxxxxxxxxxx"',
        "password = get_password_from_vault(user)",
        "token = tokenizer.encode(text)",
        "secret_key = os.environ['SECRET_KEY_BASE_1']",
        "sha256:" + letters(draw, 64, low),
        "commit " + letters(draw, 40, low),
        "md5 = " + letters(draw, 32, low),
        "uuid 550e8400-e29b-41d4-a716-446655440000",
        "-----BEGIN CERTIFICATE-----\n" + body + "\n-----END CERTIFICATE-----",
        "ssh-rsa AAAAB3Nza" + letters(draw, 80),
        "sk-learn is scikit-learn's older nickname",
        "sk-this-is-a-css-class-name-and-no-key",
        "data:image/png;base64," + letters(draw, 80),
        "AKIAIOSFODNN7EXAMPLE is in the manual",
        "password: correct-horse-battery-staple",
        "access_token: str = Field(default=None)",
        'api_token="<your-token-goes-here-0001>"',
        "the secret: keepitsimplestupidplease",
        "integrity sha512-" + letters(draw, 86) + "==",
        "hf_transfer_is_enabled_by_this_variable",
        "cache_key = " + letters(draw, 32, low),
    )


def cases() -> list[Case]:
    """The whole development set, always the same."""
    draw = random.Random(20261122)
    return [Case.of(line) for make in (emails, ips, phones, cn_ids, cards, api_keys, lines) for line in make(draw)]


# The held-out sets have separate kinds for each country's numbers and for passwords in URLs.
_KIND_OF = {"url_password": "api_key", "de_tax_id": "national_id", "fr_nir": "national_id", "uk_nino": "national_id"}


def held_out(name: str) -> list[Case]:
    """Set "a", "b", "c" or "d" of tests/data/clean/pii_heldout; its README states the labelling rules."""
    chosen = []
    for line in (Path(__file__).parent / "pii_heldout" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text, spans = record["text"], []
        for finding in record["findings"]:
            assert text.count(finding["value"]) == 1, record
            begin = text.index(finding["value"])
            kind = _KIND_OF.get(finding["kind"], finding["kind"])
            spans.append((kind, begin, begin + len(finding["value"])))
        chosen.append(Case(text, tuple(spans)))
    return chosen


def scores(chosen: list[Case]) -> dict[str, Score]:
    """Score of every kind."""
    counts = {kind: [0, 0, 0, 0] for kind in KINDS}
    for case in chosen:
        findings = find(case.text)
        for kind, begin, end in case.spans:
            counts[kind][0] += 1
            counts[kind][2] += any(f.kind == kind and f.begin < end and begin < f.end for f in findings)
        for f in findings:
            counts[f.kind][1] += 1
            counts[f.kind][3] += not any(k == f.kind and f.begin < e and b < f.end for k, b, e in case.spans)
    return {kind: Score(*values) for kind, values in counts.items()}


def table(chosen: list[Case]) -> str:
    """The table of docs/personal_data.md; a test compares the two."""
    lines = [f"{len(chosen)} lines, {sum(not case.spans for case in chosen)} of them with nothing to find:", ""]
    lines += ["| kind | labelled | found | wrong | precision | recall |", "|---|---|---|---|---|---|"]
    for kind, s in scores(chosen).items():
        lines.append(f"| {kind} | {s.labelled} | {s.found} | {s.wrong} | {s.precision:.3f} | {s.recall:.3f} |")
    return "\n".join(lines)


def main() -> None:
    chosen = held_out(sys.argv[1]) if len(sys.argv) > 1 else cases()
    print(table(chosen))
    for case in chosen:
        found = {(f.kind, case.text[f.begin : f.end]) for f in find(case.text)}
        wanted = {(kind, case.text[begin:end]) for kind, begin, end in case.spans}
        if found != wanted:
            print(
                f"\n{case.text[:120]!r}\n  missed {sorted(wanted - found)}\n  beyond {sorted(found - wanted)}", end=""
            )
    print()


if __name__ == "__main__":
    main()
