"""Opens the corpora that `data.train` names as one order of samples, with metadata for the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import xxhash

from engine.batch import Transform
from engine.config.mixture import PATH, Mixture, read_mixture, too_small
from engine.config.phases import Phases, phases_of
from engine.config.schema import Config
from engine.config.skips import read_ranges
from engine.data.samples.blend import BlendedOrder, BlendPhase, integer_weights
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.keyed import derive_key
from engine.data.samples.order import ORDER_VERSION, SampleOrder
from engine.data.samples.special import fill_in_the_middle, masked_labels
from engine.data.samples.staged import Length, StagedOrder
from engine.data.samples.transforms import LossMask, SeparateDocuments, SkipSamples
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import ConfigError, DataError, FieldError

DECLARED_MIXTURE = "mixture from step "  # data metadata: weights that data.train declares from that step on
USED_LENGTH = "seq_len from sample "  # sequence lengths used from that sample on
USED_MIXTURE = "mixture from sample "  # weights used from that sample on; final once the samples are consumed
_MOST_NOTES = 12


@dataclass(frozen=True)
class TrainingData:
    """The training data of a run.

    order: the samples. names: those of the sources of a blend, () for one corpus. metadata: stored in checkpoints.
    notes: messages about fill-in-the-middle and validation. transforms: of the rows, in order: fill-in-the-middle,
    data.skip_samples, separate_documents, mask_eod and mask_tokens. planned: for a blend, (step, weights from that step
    on), the first at step 0; () for one corpus. shares: messages about the blend.
    """

    order: SampleOrder | BlendedOrder | StagedOrder
    names: tuple[str, ...]
    metadata: dict[str, Any]
    notes: tuple[str, ...]
    transforms: tuple[Transform, ...]
    mixture: Mixture
    planned: tuple[tuple[int, tuple[int, ...]], ...] = ()
    shares: tuple[str, ...] = ()


def open_data(prefix: str, cfg: Config, tokenizer: Tokenizer | None) -> IndexedDataset:
    """Open a corpus for this model. Raises DataError if it was made with another tokenizer."""
    dataset = IndexedDataset(prefix, vocab_size=cfg.model.vocab_size)
    made_with = dataset.meta.get("tokenizer_digest")
    if tokenizer is not None and tokenizer.vocab_size > cfg.model.vocab_size:
        problem = f"is less than the {tokenizer.vocab_size} tokens of {cfg.data.tokenizer}"
        fix = f"Use {tokenizer.vocab_size} or more."
        raise ConfigError(
            [FieldError("samples.vocabulary-too-small", "model.vocab_size", cfg.model.vocab_size, problem, fix)]
        )
    if tokenizer is not None and made_with and tokenizer.digest != made_with:
        raise DataError(
            "samples.tokenizer-differs",
            f"{prefix}: was made with the tokenizer of digest {made_with}, but data.tokenizer "
            f"{cfg.data.tokenizer} has {tokenizer.digest}: use the same tokenizer, or prepare the data again",
        )
    return dataset


def open_training(cfg: Config, tokenizer: Tokenizer | None) -> TrainingData:
    """Open all corpora that `data.train` names. Raises ConfigError or DataError if one does not fit the config."""
    mixture = read_mixture(cfg.data.train)
    datasets = [open_data(prefix, cfg, tokenizer) for prefix in mixture.prefixes]
    _check_same_tokenizer(datasets)
    metadata = data_metadata(cfg.data.train, datasets)
    transforms, read_metadata = _reading(cfg, tokenizer, datasets, mixture)
    metadata |= read_metadata
    notes = [f"fill-in-the-middle: {read_metadata['fim']}"] if "fim" in read_metadata else []
    if cfg.data.valid and fingerprint(open_data(cfg.data.valid, cfg, tokenizer)) in map(fingerprint, datasets):
        notes.append("validation uses the training corpus (data.valid), so its loss does not measure new text")
    phases = phases_of(cfg)
    if len(datasets) == 1:
        order = SampleOrder(datasets[0], phases.at(1).seq_len, cfg.train.seed)
        return resume_data(TrainingData(order, (), metadata, tuple(notes), transforms, mixture), cfg, phases)
    orders = [
        SampleOrder(dataset, phases.at(1).seq_len, derive_key(cfg.train.seed, "source", k))
        for k, dataset in enumerate(datasets)
    ]
    planned = _planned(mixture, phases, orders)
    for k, (name, dataset) in enumerate(zip(mixture.names, datasets)):
        metadata[f"source {k}, {name}"] = f"{dataset.num_documents} documents, {dataset.num_tokens} tokens"
    for step, weights in planned:
        metadata[f"{DECLARED_MIXTURE}{step}"] = _format_weights(mixture.names, weights)
    blend = BlendedOrder(orders, [BlendPhase(0, planned[0][1])])
    return resume_data(
        TrainingData(blend, mixture.names, metadata, tuple(notes), transforms, mixture, planned), cfg, phases
    )


def resume_data(
    data: TrainingData, cfg: Config, run: Phases, past: Mapping[str, Any] | None = None, past_seq_len: int = 0
) -> TrainingData:
    """The data of a run that begins or resumes at the origin of its phases. past: its checkpoint's data metadata.

    past_seq_len: sequence length of the checkpoint's run, for metadata of older engines, which lack a single length.

    The past mixture is taken from the checkpoint, for any batch size it was drawn with, so each source continues at its
    own position. Weights of later phases take effect at their steps. If the sources have changed (and the resume was
    allowed), the blend is read as if it had always been the current one, and a note reports it.
    """
    step, consumed = run.origin.step, run.origin.samples
    lengths = _lengths(run, past or {}, past_seq_len)
    lengthy = {f"{USED_LENGTH}{length.start}": length.seq_len for length in lengths}
    base = data.order.stages[0] if isinstance(data.order, StagedOrder) else data.order
    changes = len(lengths) > 1 or lengths[0].seq_len != base.seq_len
    if isinstance(base, SampleOrder):
        staged = StagedOrder([base], (), lengths)
        metadata = {k: v for k, v in data.metadata.items() if not k.startswith(USED_LENGTH)} | lengthy
        notes = tuple(_length_notes(staged, ("the corpus",)))
        return replace(data, order=staged if changes else base, metadata=metadata, shares=notes)
    drawn = [phase for phase in _drawn(data.names, past or {}) if phase.start < consumed]
    since, weights = max(change for change in data.planned if change[0] <= step)
    phases = list(drawn)
    if not drawn or since == step or drawn[-1].weights != weights:
        phases.append(BlendPhase(consumed if drawn else 0, weights))
    phases += [BlendPhase(run.consumed(at).samples, weights) for at, weights in data.planned if at > step]
    used = (USED_MIXTURE, USED_LENGTH)
    metadata = {name: value for name, value in data.metadata.items() if not name.startswith(used)} | lengthy
    metadata |= {f"{USED_MIXTURE}{phase.start}": _format_weights(data.names, phase.weights) for phase in phases}
    staged = StagedOrder(base.orders, phases, lengths)
    blend = BlendedOrder(base.orders, phases)
    total = run.consumed(max(step, cfg.train.steps)).samples
    reported = _notes(data.mixture, blend, staged.epochs(total), cfg, run, total)
    reported += _length_notes(staged, data.names)
    if consumed and not drawn and any(name.startswith(USED_MIXTURE) for name in past or {}):
        reported.insert(
            0, "the checkpoint's sources have other names: the blend is read as if it had always been the current one"
        )
    return replace(data, order=staged if changes else blend, metadata=metadata, shares=tuple(reported))


def _lengths(run: Phases, past: Mapping[str, Any], past_seq_len: int) -> list[Length]:
    """The sequence lengths of a run by sample: those used so far as in the data metadata `past`, then its phases'."""
    step, consumed = run.origin.step, run.origin.samples
    used = {name.removeprefix(USED_LENGTH): value for name, value in past.items() if name.startswith(USED_LENGTH)}
    found = sorted(
        (Length(int(start), int(value)) for start, value in used.items() if int(start) < consumed),
        key=lambda length: length.start,
    )
    found = found or [Length(0, past_seq_len or run.at(step).seq_len)]
    for phase in run.phases:
        begin = max(step, phase.first_step - 1)
        if phase is run.at(begin + 1) and phase.seq_len != found[-1].seq_len:
            found.append(Length(run.consumed(begin).samples, phase.seq_len))
    return found


def _length_notes(order: StagedOrder, names: Sequence[str]) -> Iterator[str]:
    """Messages: where the sequence length changes, and how much of each source was read until then."""
    for length in order.lengths[1:]:
        read = ", ".join(f"{name} {count:.3g}" for name, count in zip(names[:_MOST_NOTES], order.epochs(length.start)))
        begin = f"sequences of {length.seq_len} tokens from sample {length.start:,}"
        yield f"{begin}: every source starts a new epoch, after {read} epochs"


def _format_weights(names: Sequence[str], weights: Sequence[int]) -> str:
    return ", ".join(f"{name} {weight}" for name, weight in zip(names, weights))


def _drawn(names: Sequence[str], past: Mapping[str, Any]) -> list[BlendPhase]:
    """Phases used so far according to a checkpoint's data metadata, by start; later sources may be missing in them.

    Empty if the checkpoint has no phases, or has other sources.
    """
    phases = []
    for name, text in past.items():
        if name.startswith(USED_MIXTURE):
            patterns = (", ".join(f"{re.escape(n)} ([0-9]+)" for n in names[:k]) for k in range(len(names), 0, -1))
            found = next(filter(None, (re.fullmatch(pattern, str(text)) for pattern in patterns)), None)
            if found is None:
                return []
            weights = [int(weight) for weight in found.groups()]
            phases.append(
                BlendPhase(int(name.removeprefix(USED_MIXTURE)), (*weights, *[0] * (len(names) - len(weights))))
            )
    return sorted(phases, key=lambda phase: phase.start)


def _reading(
    cfg: Config, tokenizer: Tokenizer | None, datasets: Sequence[IndexedDataset], mixture: Mixture
) -> tuple[tuple[Transform, ...], dict[str, Any]]:
    """(the transforms of the rows, their metadata)."""
    data = cfg.data
    transforms: list[Transform] = []
    needed = [name for name in ("mask_eod", "separate_documents", "fim_rate") if getattr(data, name)]
    eods = {name: end_of_document(datasets, name, getattr(data, name)) for name in needed}
    metadata: dict[str, Any] = {name: eod for name, eod in eods.items() if name != "fim_rate"}
    assert tokenizer is not None or not (data.mask_tokens or data.fim_rate)  # a config error, checked before
    if data.mask_tokens and tokenizer is not None:
        metadata["mask_tokens"] = list(masked_labels(data, tokenizer))
    if data.fim_rate and tokenizer is not None:
        active = [wanted is not False for wanted in mixture.fim]
        fim = fill_in_the_middle(data, tokenizer, eods["fim_rate"], cfg.train.seed, active, begin_of_document(datasets))
        spelled = f"{fim.sentinels.prefix} {fim.sentinels.suffix} {fim.sentinels.middle}"
        metadata["fim"] = f"rate {data.fim_rate}, of that SPM {data.fim_spm_rate}, tokens {spelled}"
        if not all(active):
            metadata["fim"] += f", in {', '.join(n for n, wanted in zip(mixture.names, active) if wanted)}"
        transforms.append(fim)
    if data.skip_samples:
        transforms.append(SkipSamples(read_ranges(data.skip_samples)))
    return (*transforms, *scoring_transforms(cfg, metadata, eods.get("separate_documents"))), metadata


def scoring_transforms(cfg: Config, metadata: Mapping[str, Any], separate_eod: int | None) -> tuple[Transform, ...]:
    """The transforms that validation applies too: document masking and the loss mask.

    metadata: the data metadata of a run, which says what data.mask_eod and data.mask_tokens exclude. separate_eod: the
    token that ends a document of this corpus; None: without document masking.
    """
    transforms: list[Transform] = []
    if separate_eod is not None:
        transforms.append(SeparateDocuments(separate_eod, restart=cfg.model.positions == "learned"))
    after = (metadata["mask_eod"],) if "mask_eod" in metadata else ()
    if after or metadata.get("mask_tokens"):
        transforms.append(LossMask(after, tuple(metadata.get("mask_tokens", ()))))
    return tuple(transforms)


def data_metadata(prefix: str, datasets: list[IndexedDataset]) -> dict[str, Any]:
    """Metadata over all corpora that a checkpoint stores."""
    return {
        "prefix": prefix,
        "order": ORDER_VERSION,
        "num_documents": sum(dataset.num_documents for dataset in datasets),
        "num_tokens": sum(dataset.num_tokens for dataset in datasets),
        "fingerprint": xxhash.xxh3_64("".join(map(fingerprint, datasets)).encode()).hexdigest(),
        "tokenizer_digest": next(filter(None, (d.meta.get("tokenizer_digest") for d in datasets)), None),
    }


def fingerprint(dataset: IndexedDataset) -> str:
    """XXH3-64 of lengths and tokens at up to 256 evenly spaced places: detects another corpus of the same size.

    Samples the corpus, so that opening stays cheap; `engine inspect --verify` reads every token.
    """
    digest = xxhash.xxh3_64()
    for values, run in ((dataset.lengths, 64), (dataset.tokens, 512)):
        for start in np.linspace(0, max(0, len(values) - run), 256, dtype=np.int64).tolist():
            digest.update(values[start : start + run].tobytes())
    dataset.check()
    return digest.hexdigest()


def end_of_document(datasets: Sequence[IndexedDataset], option: str, value: object = True) -> int:
    """End-of-document token of all corpora, from their sidecars; `option` of [data] is the one that needs it."""
    found = {dataset.prefix: dataset.meta.get("eod") for dataset in datasets}
    for prefix, eod in found.items():
        if not isinstance(eod, int):
            problem = f"needs the end-of-document token, and {prefix}.json names none"
            fix = "Omit it, or prepare the data with --append-eod."
            raise ConfigError([FieldError("samples.end-token-unknown", f"data.{option}", value, problem, fix)])
    if len(set(found.values())) > 1:
        raise ConfigError(
            [
                FieldError(
                    "samples.end-token-ambiguous",
                    f"data.{option}",
                    value,
                    f"finds several end-of-document tokens: {found}",
                    "Prepare all corpora with one tokenizer.",
                )
            ]
        )
    return int(next(iter(found.values())) or 0)


def begin_of_document(datasets: Sequence[IndexedDataset]) -> int | None:
    """Token that `engine prepare --prepend-bos` put before documents, from the sidecars; None without."""
    found = (dataset.meta.get("bos") for dataset in datasets)
    return next((bos for bos in found if isinstance(bos, int)), None)


def _check_same_tokenizer(datasets: list[IndexedDataset]) -> None:
    known = [dataset for dataset in datasets if dataset.meta.get("tokenizer_digest")]
    for dataset in known[1:]:
        a, b = known[0].meta["tokenizer_digest"], dataset.meta["tokenizer_digest"]
        if a != b:
            raise DataError(
                "samples.tokenizer-differs",
                f"{known[0].prefix} was made with the tokenizer of digest {a}, {dataset.prefix} with {b}: an id "
                f"has two meanings. Prepare both with one tokenizer.",
            )


def _planned(mixture: Mixture, run: Phases, orders: list[SampleOrder]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(steps before, integer weights from then on) at step 1 and for each phase that gives weights."""
    planned = []
    for phase in (phase for phase in run.phases if phase.first_step == 1 or "weights" in phase.given):
        amounts = mixture.with_weights(phase.weights)
        if mixture.kind == "epochs":
            amounts = tuple(amount * order.samples_per_epoch for amount, order in zip(amounts, orders))
        path = f"phase.{phase.number}.weights" if "weights" in phase.given else PATH
        if errors := list(too_small(mixture, amounts, path)):
            raise ConfigError(errors)
        shares = {k: share for k, share in enumerate(amounts) if share}
        weights = dict(zip(shares, integer_weights(list(shares.values()))))
        planned.append((phase.first_step - 1, tuple(weights.get(k, 0) for k in range(len(orders)))))
    return tuple(planned)


def _notes(
    mixture: Mixture, order: BlendedOrder, epochs: Sequence[float], cfg: Config, run: Phases, total: int
) -> list[str]:
    """Messages: how often the run reads each source in `total` samples, and whether its length fits the amounts."""
    counts = order.counts(total).tolist()
    notes = [
        f"source {name}: {count:,} of {total:,} samples ({count / total:.2%}), {times:.3g} epochs"
        for name, count, times in zip(mixture.names[:_MOST_NOTES], counts, epochs)
    ]
    if len(counts) > _MOST_NOTES:
        notes.append(f"... and {len(counts) - _MOST_NOTES} more sources")
    if mixture.kind != "weight":
        amounts = mixture.amounts
        each = [Fraction(cfg.train.seq_len)] * len(counts)
        if mixture.kind == "epochs":
            each = [Fraction(1, one.samples_per_epoch) for one in order.orders]
        wanted = float(sum(amount / part for amount, part in zip(amounts, each)))
        if abs(total - wanted) > max(1.0, 0.001 * wanted):
            steps = run.steps_to_read(wanted)
            notes.append(
                f"the requested {mixture.kind} need {steps:,} steps, the run has {cfg.train.steps:,}: each source gets "
                f"{total / wanted:.3g} times its amount"
            )
    return notes
