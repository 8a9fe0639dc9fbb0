"""Trains a tokenizer on texts in this process: with `tokenizers` for bpe and wordpiece, sentencepiece for unigram.

A unigram model is trained on characters and has byte fallback: a token for each of the 256 bytes encodes characters
outside its vocabulary. So no character is split within a token, and any text can be encoded. Training on bytes, where a
Chinese clause becomes one word of a hundred symbols, took twenty times as long and gave worse tokens.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from engine.data.tokenize.patterns import DIGITS, words
from engine.data.tokenize.recipe import CHARACTER_COVERAGE, MAX_PIECE_LENGTH, MIN_FREQUENCY, UNKNOWN, Recipe
from engine.errors import DataError

TokenizerFiles = tuple[str, dict[str, bytes]]  # (text of tokenizer.json, companion file name -> content)
_NORMALIZERS = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC}
_THREADS = 16  # of sentencepiece, fixed: sums, and therefore the tokens, depend on it (but not on the number of cores)
_NEVER = -1e6  # log-probability of pieces that texts must never become
# Characters with a special meaning to sentencepiece, and their placeholders during training.
_PLACEHOLDERS = {ord(char): 0x10FF00 + number for number, char in enumerate("\0\t\n\r▁▅⁇\ufffd")}
_RESTORED = {new: chr(old) for old, new in _PLACEHOLDERS.items()} | {ord("▁"): " "}
# A piece never crosses a space, except for leading ones, nor the end of a line.
_WORD_WITH_SPACES = re.compile(r" *[^ \n]{0,1000}\n+| *[^ \n]{1,1000}| +")


def train(texts: Iterable[str], recipe: Recipe, *, report_progress: bool = False) -> TokenizerFiles:
    """Train the tokenizer of `recipe` on these texts; returns its files, which name the end token for transformers.

    report_progress: the libraries write their progress to standard error (train_process.py parses it). Raises DataError
    if the recipe is invalid or the texts are not sufficient.
    """
    if errors := list(recipe.errors()):
        raise DataError("tokenize.recipe-faults", "\n".join(map(str, errors)))
    tokenizer = _TRAINERS[recipe.kind](_split_at_user_tokens(texts, recipe.user_tokens), recipe, report_progress)
    if recipe.user_tokens:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in recipe.user_tokens])
    special = {"eos_token": recipe.special_tokens[0]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    companions = {"tokenizer_config.json": config, "special_tokens_map.json": special}
    return tokenizer.to_str(), {name: json.dumps(content).encode() for name, content in companions.items()}


def _split_at_user_tokens(texts: Iterable[str], user_tokens: tuple[str, ...]) -> Iterator[str]:
    """The parts of the texts between user tokens, which are matched before anything else."""
    if not user_tokens:
        yield from texts
        return
    longest_first = sorted(user_tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    for text in texts:
        yield from filter(None, pattern.split(text))


def _normalizer(recipe: Recipe) -> normalizers.Normalizer | None:
    return _NORMALIZERS[recipe.normalizer]() if recipe.normalizer != "none" else None


def _splits(recipe: Recipe) -> list[pre_tokenizers.PreTokenizer]:
    """Pre-tokenizers that split texts into words as the recipe asks; [] if it does not."""
    patterns: tuple[str, ...] = (DIGITS[recipe.digits],) if recipe.digits else ()
    if recipe.split_pattern:
        patterns = words(recipe.split_pattern, recipe.digits)
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def _bpe_trainer(vocab_size: int, recipe: Recipe, report_progress: bool, **options: Any) -> trainers.BpeTrainer:
    if report_progress and hasattr(trainers.BpeTrainer, "progress_format"):
        options["progress_format"] = "json"
    else:
        report_progress = False
    minimum = MIN_FREQUENCY if recipe.min_frequency is None else recipe.min_frequency
    return trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=minimum, show_progress=report_progress, **options)


def _bpe(texts: Iterator[str], recipe: Recipe, report_progress: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if recipe.split_pattern in ("", "gpt2") and not recipe.digits:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        pattern = recipe.split_pattern or "gpt2"
        splits = [pre_tokenizers.Split(Regex(one), "isolated") for one in words(pattern, recipe.digits)]
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    if (normalizer := _normalizer(recipe)) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    # The library's limit is exclusive, and it always makes tokens of two bytes.
    limit = {} if recipe.max_token_length is None else {"max_token_length": recipe.max_token_length + 1}
    trainer = _bpe_trainer(
        recipe.vocab_size - len(recipe.user_tokens),
        recipe,
        report_progress,
        special_tokens=list(recipe.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        **limit,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _wordpiece(texts: Iterator[str], recipe: Recipe, report_progress: bool) -> tokenizers.Tokenizer:
    """Same result as the library's own WordPiece trainer, which wraps this BPE trainer but reports no progress."""
    merged = tokenizers.Tokenizer(models.BPE())
    merged.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if (normalizer := _normalizer(recipe)) is not None:
        merged.normalizer = normalizer
    trainer = _bpe_trainer(
        recipe.vocab_size - len(recipe.user_tokens),
        recipe,
        report_progress,
        special_tokens=[*recipe.special_tokens, UNKNOWN["wordpiece"]],
        continuing_subword_prefix="##",
        **({} if recipe.limit_alphabet is None else {"limit_alphabet": recipe.limit_alphabet}),
    )
    merged.train_from_iterator(texts, trainer)
    vocab = merged.get_vocab(with_added_tokens=False)
    if len(vocab) > (limit := recipe.vocab_size - len(recipe.user_tokens)):
        raise DataError(
            "tokenize.alphabet-too-large",
            f"--vocab-size = {recipe.vocab_size}: the single characters of these texts, at the start of words and "
            f"inside, are {len(vocab):,} tokens. --limit-alphabet {max(1, limit // 4)} keeps the most frequent ones.",
        )
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN["wordpiece"]))
    tokenizer.pre_tokenizer = merged.pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.WordPiece()
    special = [*recipe.special_tokens, UNKNOWN["wordpiece"]]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _unigram(texts: Iterator[str], recipe: Recipe, report_progress: bool) -> tokenizers.Tokenizer:
    lines = pre_tokenizers.Split(Regex("\n+"), "merged_with_previous")
    splits = _splits(recipe)
    pre_tokenizer = pre_tokenizers.Sequence(splits) if splits else lines
    normalizer = _normalizer(recipe)
    if normalizer is not None:
        texts = map(normalizer.normalize_str, texts)
    counts: Counter[str] = Counter()
    for text in texts:
        if splits:
            counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(text))
        else:
            counts.update(_WORD_WITH_SPACES.findall(text))
    if not counts:
        raise DataError("tokenize.no-text", "no text to train on")
    num_pieces = recipe.vocab_size - recipe.num_reserved_tokens()
    alphabet = _alphabet(counts, recipe, num_pieces)
    known = _split_at_unknown(counts, alphabet)
    pieces = _pieces(known, recipe, alphabet, num_pieces, report_progress, by_rules=not splits)
    reserved = [*recipe.special_tokens, UNKNOWN["unigram"], *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = [(token, _NEVER) for token in reserved] + pieces
    model = models.Unigram(vocab, unk_id=len(recipe.special_tokens), byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in recipe.special_tokens])
    return tokenizer


def _alphabet(counts: Counter[str], recipe: Recipe, num_pieces: int) -> set[str]:
    """Characters that become pieces: the most frequent ones that reach the requested coverage, and the required ones.

    Without a requested coverage they take at most half of the vocabulary; rarer characters are encoded as bytes.
    """
    seen: Counter[str] = Counter()
    for word, count in counts.items():
        for char in word:
            seen[char] += count
    coverage = CHARACTER_COVERAGE if recipe.character_coverage is None else recipe.character_coverage
    wanted = coverage * seen.total()
    ordered = sorted(seen, key=lambda char: (-seen[char], char))
    summed = list(itertools.accumulate(seen[char] for char in ordered))
    enough = next((at + 1 for at, total in enumerate(summed) if total >= wanted), len(ordered))
    required = recipe.required_characters()
    if recipe.character_coverage is None:
        enough = min(enough, max(1, (num_pieces - len(required)) // 2))
    alphabet = required | set(ordered[:enough])
    if len(alphabet) > num_pieces:
        raise DataError(
            "tokenize.alphabet-too-large",
            f"vocab_size = {recipe.vocab_size}: leaves {num_pieces} pieces, and {len(alphabet):,} characters must be "
            f"among them. Give a larger --vocab-size or a smaller --character-coverage.",
        )
    return alphabet


def _split_at_unknown(counts: Counter[str], alphabet: set[str]) -> Counter[str]:
    """Counts of words without characters outside the alphabet; words are split at those."""
    others = {char for word in counts for char in word} - alphabet
    if not others:
        return counts
    pattern = re.compile("[" + "".join(map(re.escape, sorted(others))) + "]")
    known: Counter[str] = Counter()
    for word, count in counts.items():
        for part in pattern.split(word):
            if part:
                known[part] += count
    return known


def _pieces(
    counts: Counter[str], recipe: Recipe, alphabet: set[str], num_pieces: int, report_progress: bool, by_rules: bool
) -> list[tuple[str, float]]:
    """sentencepiece's (piece, log-probability). by_rules: no piece mixes scripts, or digits and letters."""
    try:
        import sentencepiece
    except ImportError as err:
        raise DataError(
            "tokenize.sentencepiece-missing", f"{err}: --kind unigram needs `pip install 'trident-engine[formats]'`."
        ) from err
    model = io.BytesIO()
    missing = sorted(alphabet - {char for word in counts for char in word})
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word.translate(_PLACEHOLDERS)}\t{count}" for word, count in counts.items()),
            input_format="tsv",
            model_writer=model,
            model_type="unigram",
            vocab_size=num_pieces - len(missing) + 1,  # + 1: its <unk>
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentencepiece_length=recipe.max_token_length or MAX_PIECE_LENGTH,
            max_sentence_length=1 << 30,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=by_rules,
            split_by_unicode_script=by_rules,
            split_by_number=by_rules,
            bos_id=-1,
            eos_id=-1,
            num_threads=_THREADS,
            minloglevel=0 if report_progress else 2,
        )
    except RuntimeError as err:
        raise DataError("tokenize.training-failed", f"sentencepiece cannot train on these texts: {err}") from err
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    numbers = [number for number in range(trained.vocab_size()) if not trained.is_unknown(number)]
    pieces = [(trained.id_to_piece(number).translate(_RESTORED), trained.get_score(number)) for number in numbers]
    least = min(score for _, score in pieces)
    return pieces + [(char, least - 0.01 * (1 + at)) for at, char in enumerate(missing)]


_TRAINERS: dict[str, Callable[[Iterator[str], Recipe, bool], tokenizers.Tokenizer]] = {
    "bpe": _bpe,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}
