"""``mixtral-recipes data``: prepare a corpus, check a data set, show what is learned."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mixtral_recipes.cli.options.checkpoint import Overwrite
from mixtral_recipes.cli.options.groups import App, argument, option
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import console, note, print_json, print_table, table
from mixtral_recipes.system.escapes import in_a_line, printable

if TYPE_CHECKING:
    from mixtral_recipes.data.check.check import Report
    from mixtral_recipes.data.recognise import Recognized

app = App("Prepare a corpus, check a data set, show what is learned.")

Data = Annotated[str, argument("DATA", "What `finetune --data` takes: a file, folder or Hub id.")]
SeqLength = Annotated[int, option("--seq-length N", "Maximum tokens of a sample.", min=8)]
Settings = Annotated[
    list[str] | None, argument("SETTING=VALUE", "Settings of the run: data.learn=last data.on_bad_record=skip")
]
TOKENIZER = option(
    "--tokenizer NAME",
    "Folder, Hub id, SentencePiece file, mistral://mixtral-8x7b (no download), or embedded://mixtral_tiny.",
)


@app.command()
def prepare(
    *,
    inputs: Annotated[list[str], argument("TEXT...", "JSONL, parquet, CSV or text files.")],
    output: Annotated[Path, option("--output -o PATH", "Path of the corpus; .bin and .idx are added.")],
    tokenizer: Annotated[str, TOKENIZER] = "mistral://mixtral-8x7b",
    text_key: Annotated[str, option("--text-key NAME", "Field or column that holds the text.")] = "text",
    workers: Annotated[int | None, option("--workers N", "Processes; default: one per core.", min=1)] = None,
    part_mb: Annotated[int, option("--part-mb N", "Megabytes of input per part.", min=1)] = 32,
    on_bad_record: Annotated[
        str, option("--on-bad-record WHAT", "Records without text: stop, or skip them and write them to a file.")
    ] = "stop",
    bos: Annotated[bool, option("--bos/--no-bos", "Start documents with the tokenizer's bos.")] = True,
    eos: Annotated[bool, option("--eos/--no-eos", "End documents with its eos.")] = True,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Tokenize text into Megatron's indexed corpus. A stopped run continues where it left off."""
    from mixtral_recipes.data.corpus import Encoder, prepare_corpus
    from mixtral_recipes.data.tokenizers import load_tokenizer
    from mixtral_recipes.embedded import resolve
    from mixtral_recipes.system.machine import cores
    from mixtral_recipes.system.progress import progress_bar

    if output.suffix in (".bin", ".idx"):
        output = output.with_suffix("")
    paths = [resolve(path) for path in inputs]
    encoder = Encoder.of(load_tokenizer(tokenizer), bos=bos, eos=eos)
    output.parent.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in paths if path.is_file())
    with progress_bar("tokenizing", size) as advance:
        made = prepare_corpus(
            paths,
            output,
            encoder,
            text_key=text_key,
            num_workers=workers or cores(),
            part_bytes=part_mb << 20,
            overwrite=overwrite,
            on_bad_record=on_bad_record,
            progress=advance,
        )
    reused = f", {made.reused_parts} parts reused from an earlier run" if made.reused_parts else ""
    note(f"{made.prefix}.bin and .idx: {made.documents:,} documents, {made.tokens:,} tokens{made.left_out()}{reused}")
    if json:
        print_json(
            {
                "prefix": str(made.prefix),
                "documents": made.documents,
                "tokens": made.tokens,
                "reused": made.reused_parts,
                "empty": made.empty,
                "skipped": made.skipped,
            }
        )


@app.command()
def check(
    *,
    data: Data,
    settings: Settings = None,
    tokenizer: Annotated[str | None, TOKENIZER] = None,
    seq_length: SeqLength = 2048,
    show_all: Annotated[bool, option("--all", "List every finding, not just the first five of each kind.")] = False,
    png: Annotated[Path | None, option("--png FILE", "Write the length histogram to this file.")] = None,
    json: Json = False,
) -> None:
    """Check every record: unusable ones by line, what is learned, cut and left out, duplicates."""
    from mixtral_recipes.data.check.check import check as check_data
    from mixtral_recipes.data.tokenizers import load_tokenizer
    from mixtral_recipes.errors import DataError
    from mixtral_recipes.system.progress import progress_bar

    recognized, wanted = _recognized(data, settings or [])
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    with progress_bar("checking", None, unit="records") as advance:
        report = check_data(recognized, loaded, seq_length=seq_length, settings=wanted, progress=advance)
    _print_report(report, seq_length, limit=None if show_all else 5)
    if png:
        from mixtral_recipes.data.check.histogram import save_png

        save_png(report, png, seq_length)
        note(f"histogram: {png}")
    if json:
        print_json(_as_json(report, recognized))
    if report.errors and not (wanted.get("on_bad_record") == "skip" and report.usable):
        what = f"{report.unusable:,} record(s) cannot be used" if report.unusable else f"{report.errors:,} error(s)"
        raise DataError(f"{data}: {what}; see above.")


@app.command()
def show(
    *,
    data: Data,
    settings: Settings = None,
    tokenizer: Annotated[str, TOKENIZER] = "mistral://mixtral-8x7b-instruct",
    count: Annotated[int, option("--count -n N", "Samples.", min=1)] = 3,
    seq_length: SeqLength = 2048,
    split: Annotated[str, option("--split NAME", "train, validation or test.")] = "train",
    html: Annotated[Path | None, option("--html FILE", "Write a page: learned, context, cut in colours.")] = None,
    json: Json = False,
) -> None:
    """Print samples as they are tokenized, with what is learned in colour.

    Without colour, what is learned is in brackets.
    """
    from mixtral_recipes.data.batches.batch import Sample
    from mixtral_recipes.data.tokenizers import load_tokenizer
    from mixtral_recipes.errors import DataError, nearest

    recognized, wanted = _recognized(data, settings or [])
    module = recognized.module(seq_length=seq_length, **wanted)
    loaded = load_tokenizer(tokenizer)
    if html is not None:
        _write_page(module.pipeline(), recognized.description, loaded, html, split, count)
        return
    sets: dict[str, Any] = module.datasets(loaded)
    if split not in sets:
        raise DataError(f"{data} has no {split} split.{nearest(split, tuple(sets))}")
    out = console()
    shown: list[dict[str, Any]] = []
    for number in range(min(count, len(sets[split]))):
        item = sets[split][number]
        if "labels" in item:  # a pretraining sequence: every token is learned
            item = Sample(tokens=item["tokens"].numpy(), loss_mask=item["loss_mask"].numpy()[:-1])
        out.rule(f"{split} {number}: {len(item['tokens'])} tokens, {int(sum(item['loss_mask']))} learned")
        out.print(_coloured(item, loaded, colour=out.color_system is not None))
        shown.append({"tokens": item["tokens"].tolist(), "learned": [bool(x) for x in item["loss_mask"]]})
    if json:
        print_json({"split": split, "samples": shown})


def _recognized(data: str, settings: list[str]) -> tuple["Recognized", dict[str, Any]]:
    """What a data set is, which is said, and the settings of the module that reads it."""
    from mixtral_recipes.cli.jobs.data_settings import columns_in, module_settings
    from mixtral_recipes.data.recognise import recognize

    recognized = recognize(data, columns_in(settings))
    note(recognized.description)
    return recognized, module_settings(recognized, settings)


def _write_page(pipeline: Any, description: str, tokenizer: Any, file: Path, split: str, count: int) -> None:
    import itertools

    from mixtral_recipes.data.batches.fit import Tally
    from mixtral_recipes.data.check.page import write_page
    from mixtral_recipes.data.records.bad_records import Skipped
    from mixtral_recipes.errors import DataError

    if pipeline is None or split not in pipeline.splits:
        raise DataError(f"{description} has no records in the {split} split to show.")
    outcomes = itertools.islice(pipeline.outcomes(split, tokenizer, Skipped(), Tally()), count)
    write_page(file, description, outcomes, tokenizer)
    note(f"page: {file}")


@app.command()
def stats(
    *,
    data: Data,
    more: Annotated[
        list[str] | None, argument("OTHER|SETTING=VALUE", "A second data set, to compare; settings of a run, for both.")
    ] = None,
    tokenizer: Annotated[str, TOKENIZER] = "mistral://mixtral-8x7b-instruct",
    seq_length: SeqLength = 2048,
    json: Json = False,
) -> None:
    """Count records, turns and tokens of a data set, or of two side by side, and how many prompts they share."""
    from mixtral_recipes.cli.jobs.data_settings import columns_in, module_settings
    from mixtral_recipes.data.check.stats import compare
    from mixtral_recipes.data.recognise import recognize
    from mixtral_recipes.data.tokenizers import load_tokenizer
    from mixtral_recipes.errors import DataError

    settings = [text for text in more or () if text.startswith("data.") and "=" in text]
    names = [data, *(text for text in more or () if text not in settings)]
    if len(names) > 2:
        raise DataError(f"{names[2]}: no more than two data sets can be compared, and settings start with data.")
    sets = {name: recognize(name, columns_in(settings)) for name in names}
    modules = {name: one.module(seq_length=seq_length, **module_settings(one, settings)) for name, one in sets.items()}
    found = compare(modules, load_tokenizer(tokenizer))
    print_table(table(("", *found.names), [(name, *map(str, values)) for name, values in found.rows]))
    if json:
        print_json({"names": found.names, "rows": dict(found.rows)})


def _coloured(sample: Any, tokenizer: Any, *, colour: bool) -> Any:
    import itertools

    from rich.text import Text

    learned = [False, *(bool(x) for x in sample["loss_mask"])]
    text = Text()
    runs = itertools.groupby(zip(sample["tokens"].tolist(), learned, strict=True), key=lambda pair: pair[1])
    for is_learned, run in runs:
        part = printable(tokenizer.decode([token for token, _ in run]))
        text.append(part if colour or not is_learned else f"[[{part}]]", style="bold green" if is_learned else "dim")
    return text


def _print_report(report: "Report", seq_length: int, *, limit: int | None) -> None:
    import numpy as np

    from mixtral_recipes.data.check.histogram import bars

    out = console()
    shown: dict[tuple[str, str], int] = {}
    for finding in report.findings:
        key = (finding.level, finding.kind)
        shown[key] = shown.get(key, 0) + 1
        if limit is None or shown[key] <= limit:
            detail = f": {finding.detail}" if finding.detail else ""
            out.print(
                in_a_line(f"{finding.where}: {finding.level}: {finding.kind}{detail}"), markup=False, soft_wrap=True
            )
    if report.counts:
        counts = [(level, kind, f"{number:,}") for (level, kind), number in sorted(report.counts.items())]
        print_table(table(("level", "what", "records"), counts))
    for split, tally in report.tallies.items():
        if report.unit == "tokens" or tally.unused:
            told = list(tally.sentences(seq_length))[0 if report.unit == "tokens" else -1 :]
            out.print(in_a_line(f"{split}: {'; '.join(told)}"), markup=False, soft_wrap=True)
    titles = ("split", "records", f"{report.unit} in all", "shortest", "median", "99 %", "longest", "too long")
    rows: list[tuple[str, ...]] = []
    for split, lengths in report.lengths.items():
        if len(lengths):
            low, median, high, most = map(int, np.quantile(lengths, (0, 0.5, 0.99, 1), method="nearest"))
            cut = "-" if report.unit == "characters" else f"{int((lengths > seq_length + 1).sum()):,}"
            cells = (len(lengths), int(lengths.sum()), low, median, high, most)
            rows.append((split, *(f"{x:,}" for x in cells), cut))
    print_table(table(titles, rows))
    out.print(bars(report), markup=False)


def _as_json(report: "Report", recognized: "Recognized") -> dict[str, Any]:
    return {
        "kind": recognized.kind,
        "module": recognized.module_class.__name__,
        "records": report.records,
        "splits": {split: tally.as_dict() for split, tally in report.tallies.items()},
        "errors": report.errors,
        "findings": {f"{level}: {kind}": count for (level, kind), count in report.counts.items()},
        "named": [finding._asdict() for finding in report.findings],
        report.unit: {split: int(lengths.sum()) for split, lengths in report.lengths.items()},
    }
