"""What each command of `paddle-clip` does: a function of its parsed arguments, which may return an exit code.

Each imports what it uses: `convert` needs no Paddle, and `search` no matplotlib.
"""

import json
import os
import re
import signal
import sys

from .cli import INTERRUPTED, one_line

SAMPLES = "@samples"


def models(arguments):
    from .presets import PRESETS, TINY, table

    if arguments.json:
        _print_json([_fields(row, "config") | _fields(row.config) for row in (*PRESETS, TINY)])
    else:
        print(table((*PRESETS, TINY)))


# ------------------------------------------------------------------------------------------------------------- convert
# Also what the scripts in convert/ do.


def convert(arguments, after=lambda file, report: ""):
    """Converts files, or reports on them; what `after` returns is printed after each."""
    from .converter import check, convert

    if not arguments.check:
        require_different_outputs(arguments)

    def work(file):
        contents = None
        if arguments.check:
            report, contents = check(file, arguments.activation)
        else:
            report = convert(file, arguments.output, arguments.dtype, arguments.activation, progress)
        if getattr(arguments, "json", False):  # the scripts have no such option
            told = {**report._asdict(), "config": _fields(report.config)}
            return json.dumps({"file": file, **told, **(contents._asdict() if contents else {})})
        if contents:
            return describe_contents(file, report, contents)
        return describe_conversion(file, report) + after(file, report)

    return each(arguments.files, work)


def require_different_outputs(arguments):
    """Ends the program if several files would be converted to one."""
    if arguments.output and len(arguments.files) > 1:
        arguments.refuse("-o names one output; convert several files without it")
    stems = [os.path.realpath(os.path.splitext(file)[0]) for file in arguments.files]
    if len(set(stems)) < len(stems):
        arguments.refuse(
            "two of these files have one output, as only their extensions differ: convert each alone, with -o"
        )


def each(files, work):
    """Prints what `work` says of each file, or one error line; returns the exit code."""
    failed = False
    for file in files:
        try:
            print(work(file), flush=True)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, MemoryError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            print(f"error: interrupted at {file}; no partial file is left", file=sys.stderr)
            return INTERRUPTED
    return int(failed)


def progress(names, total):
    """A progress bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        return names
    try:
        from tqdm import tqdm  # here, as importing it takes longer than converting a small file
    except ImportError:
        return names
    return tqdm(names, total=total, desc="converting", unit="tensor", leave=False)


def describe(report):
    """The lines that tell what a file is, as (label, text)."""
    beside = f", {report.ignored} tensors beside {report.prefix}* ignored" if report.ignored else ""
    dropped = f" ({len(report.dropped)} that are not weights dropped)" if report.dropped else ""
    official = f"official {report.official}" if report.official else "not an official file"
    return [
        ("format", report.kind + beside),
        ("preset", report.preset or f"none of the nine presets: {report.config}"),
        ("activation", f"{report.config.activation} (by {report.activation_from})"),
        ("SHA-256", f"{report.sha256}: {official}"),
        ("tensors", f"{report.tensors}{dropped}"),
    ]


def describe_conversion(file, report):
    """What a conversion did."""
    lines = [*describe(report), ("bytes", f"{report.bytes:,}"), ("seconds", f"{report.seconds:.2f}")]
    return "\n".join([f"{file} -> {report.output}", *(f"  {label:<10} {text}" for label, text in lines)])


def describe_contents(file, report, contents):
    """What is in a file."""
    lines = [
        *describe(report),
        ("dtypes", ", ".join(f"{count} {dtype}" for dtype, count in sorted(contents.dtypes.items()))),
        ("NaN, inf", f"{contents.nan:,}, {contents.inf:,}"),
        ("checksums", f"{contents.checksums} tensors are as written" if contents.checksums else "none in the file"),
    ]
    return "\n".join([file, *(f"  {label:<10} {text}" for label, text in lines)])


# ----------------------------------------------------------------------------------------------------------- zero-shot


def classify(arguments):
    labels, templates = _labels(arguments)
    if not labels:
        raise ValueError("there are no labels: give --labels, --labels-file or --prompts")
    images = _images(arguments.images)
    model, preprocess = _load(arguments)

    from .zeroshot import classify

    found = classify(model, preprocess, images, labels, templates, arguments.top_k, arguments.batch_size)
    if arguments.json:
        _print_json(
            [{"image": image, "labels": [label._asdict() for label in best]} for image, best in zip(images, found)]
        )
        return
    for image, best in zip(images, found):
        print(image)
        for prediction in best:
            print(f"  {prediction.probability:7.2%}  {prediction.label}")


def similarity(arguments):
    images = _images(arguments.images)
    texts = arguments.texts + (_lines(arguments.texts_file) if arguments.texts_file else [])
    texts = texts or [re.sub("[-_]+", " ", os.path.splitext(os.path.basename(image))[0]) for image in images]
    if arguments.plot:
        import logging

        from . import plots

        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # Paddle makes it tell of its font cache
        plots.require_writable(arguments.plot)
    model, preprocess = _load(arguments)

    from .features import embed
    from .zeroshot import encode_texts

    text_features = encode_texts(model, texts).astype("float32").numpy()  # [M, E]
    text_features /= (text_features**2).sum(axis=1, keepdims=True) ** 0.5
    cosines = embed(model, preprocess, images, batch_size=arguments.batch_size).features @ text_features.T  # [N, M]
    if arguments.plot:
        plots.similarity(images, texts, cosines, arguments.plot)
    if arguments.json:
        _print_json({"images": images, "texts": texts, "similarity": cosines.tolist()})
        return
    width = min(max(map(len, texts)), 60)
    for image, row in zip(images, cosines):
        print(image)
        for text, cosine in zip(texts, row):
            print(f"  {_cut(text, width):<{width}}  {cosine:6.3f}{'  <' if cosine == row.max() else ''}")


def evaluate(arguments):
    labels, templates = _labels(arguments)
    _require_folder(arguments.folder)
    model, preprocess = _load(arguments)

    from .zeroshot import evaluate

    on_error = "skip" if arguments.skip_damaged else "raise"
    found = evaluate(
        model, preprocess, arguments.folder, labels, templates, arguments.batch_size, arguments.workers, on_error
    )
    if arguments.json:
        _print_json(found._asdict())
    else:
        print(f"top-1 {found.top1:.2%}, top-5 {found.top5:.2%} of {found.count:,} images")


# ------------------------------------------------------------------------------------------------------------ features


def embed(arguments):
    images = arguments.images
    images = images[0] if len(images) == 1 and os.path.isdir(images[0]) else _images(images)

    from .features import embed, require_output

    require_output(arguments.output)
    model, preprocess = _load(arguments)
    found = embed(
        model,
        preprocess,
        images,
        arguments.output,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        on_error="skip" if arguments.skip_damaged else "raise",
        normalize=not arguments.raw,
        resume=not arguments.restart,
    )
    count, width = found.features.shape
    if arguments.json:
        _print_json({"output": arguments.output, "count": count, "width": width, "damaged": found.damaged})
    else:
        damaged = f", {len(found.damaged):,} images skipped" if found.damaged else ""
        print(f"{arguments.output}: {count:,} features of {width} numbers{damaged}")


def search(arguments):
    from pathlib import Path

    from .features import load_features, search

    features, paths, _ = load_features(arguments.features)
    query = arguments.text
    if arguments.image:
        found = _images([arguments.image])
        if len(found) > 1:
            raise ValueError(f"{arguments.image} has {len(found)} images: --image takes one")
        query = Path(found[0])
    model, preprocess = _load(arguments)
    found = search(model, preprocess, features, paths, query, arguments.top_k)
    if arguments.json:
        _print_json([match._asdict() for match in found])
        return
    for match in found:
        print(f"{match.score:6.3f}  {match.path}")


def probe(arguments):
    for folder in filter(None, (arguments.train, arguments.test)):
        _require_folder(folder)
    if arguments.output:
        from .writers import require_place

        require_place(arguments.output)
    model, preprocess = _load(arguments)

    from .features import embed
    from .probe import linear_probe
    from .zeroshot import labelled_files

    def features(folder):
        paths, items, folders = labelled_files(folder)
        found = embed(
            model,
            preprocess,
            paths,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            normalize=False,  # as in OpenAI's example
        )
        return found.features, [folders[label] for _, label in items]

    rows, labels = features(arguments.train)
    fitted = linear_probe(rows, labels, arguments.C)
    told = {"images": len(labels), "classes": len(fitted.classes), "C": fitted.C, "train": fitted.score(rows, labels)}
    if arguments.test:
        told["test"] = fitted.score(*features(arguments.test))
    if arguments.output:
        fitted.save(arguments.output)
    if arguments.json:
        _print_json(told)
        return
    print(f"{told['images']:,} images of {told['classes']} classes, C {told['C']:.3g}")
    print(", ".join(f"accuracy on {name} {told[name]:.2%}" for name in ("train", "test") if name in told))


# ------------------------------------------------------------------------------------------------------------ training


def finetune(arguments):
    from .pairs import read_pairs
    from .writers import require_place

    pairs = read_pairs(arguments.pairs, arguments.template)
    require_place(arguments.output)
    model, preprocess = _load(arguments)

    from tqdm import tqdm

    from .training import finetune

    steps = []

    def on_step(step):
        steps.append(step)
        bar.total, bar.initial = step.steps, steps[0].step - 1
        bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
        bar.update(step.step - bar.n)
        if arguments.json:
            print(json.dumps(step._asdict()), flush=True)
        elif len(steps) > 1 and step.epoch > steps[-2].epoch:
            say(steps[-2])

    def say(step):
        with bar.external_write_mode():
            print(f"epoch {step.epoch}, step {step.step} of {step.steps}: loss {step.loss:.4f}", flush=True)

    with tqdm(unit="step", disable=None) as bar:
        finetune(
            model,
            pairs,
            arguments.output,
            preprocess=preprocess,
            **{
                name: getattr(arguments, name)
                for name in (
                    *("epochs", "batch_size", "accumulate", "learning_rate", "warmup", "weight_decay", "clip_norm"),
                    *("freeze", "amp", "seed", "save_every", "resume", "logdir", "workers"),
                )
            },
            on_step=on_step,
        )
        if steps and not arguments.json:
            say(steps[-1])
    if not arguments.json:
        print(f"{arguments.output}: trained on {len(pairs):,} pairs")


# ---------------------------------------------------------------------------------------------------------- deployment


def export(arguments):
    from .deploy import export, require_export

    require_export(arguments.output, arguments.dtype, arguments.onnx, arguments.openvino)
    model, _ = _load(arguments)
    export(model, arguments.output, onnx=arguments.onnx, openvino=arguments.openvino)
    if arguments.json:
        _print_json({"output": arguments.output})
    else:
        print(f"{arguments.output}: load it with paddle_clip.Predictor({arguments.output!r})")


def bench(arguments):
    if arguments.repeat < 1 or min(arguments.batch_size) < 1:
        raise ValueError("--repeat and --batch-size must be at least 1")
    model, _ = _load(arguments)

    import paddle

    from .deploy import compile
    from .tokenizer import tokenize

    compiled = compile(model, threads=arguments.threads)
    rows = []
    for size in arguments.batch_size:
        side = model.visual.input_resolution
        texts = tokenize(["a photo of a dog."] * size, model.context_length)
        inputs = {"image": paddle.rand([size, 3, side, side]), "text": texts}
        for tower, batch in inputs.items():
            eager, fast = (
                _median(getattr(form, f"encode_{tower}"), batch, arguments.repeat) for form in (model, compiled)
            )
            rows.append({"encoder": tower, "batch": size, "eager_ms": eager, "compiled_ms": fast})
    if arguments.json:
        _print_json(rows)
        return
    print(f"{'encoder':<8}{'batch':>6}{'eager ms':>12}{'compiled ms':>13}{'speed-up':>10}")
    for row in rows:
        ratio = row["eager_ms"] / row["compiled_ms"]
        print(f"{row['encoder']:<8}{row['batch']:>6}{row['eager_ms']:>12.2f}{row['compiled_ms']:>13.2f}{ratio:>10.2f}")


def _median(encode, batch, repeat):
    """Milliseconds of one call, the result on its way to the user; the first two calls do not count."""
    import statistics
    import time

    import numpy as np
    import paddle

    seconds = []
    with paddle.no_grad():
        for _ in range(repeat + 2):
            start = time.perf_counter()
            np.asarray(encode(batch))
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[2:])


# ------------------------------------------------------------------------------------------------------ what they share


def _load(arguments):
    import paddle

    from .hub import load

    if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # again: Paddle put its own in place, which can hang
    if arguments.device:
        paddle.set_device(arguments.device)
    return load(arguments.model, getattr(arguments, "dtype", "float32"), activation=arguments.activation)


def _images(names):
    """The paths of the images that were named: files, all images in folders, or the samples."""
    from .images import image_files

    paths = []
    for name in names:
        if name == SAMPLES:
            name = os.path.join(os.path.dirname(__file__), "data", "samples")
        if os.path.isdir(name):
            paths += image_files(name)
        else:
            with open(name, "rb"):  # that it is there is told before a model is loaded
                paths.append(name)
    return paths


def _labels(arguments):
    """The class names asked for, or None, and the templates."""
    labels, templates = arguments.labels, ["a photo of a {}."]
    if arguments.labels_file:
        labels = _lines(arguments.labels_file)
    elif arguments.prompts:
        from .zeroshot import prompts

        labels, templates = prompts(arguments.prompts)
    return labels, arguments.template or templates


def _lines(path):
    with open(path, encoding="utf-8-sig") as file:
        try:
            lines = [line.strip() for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text in UTF-8: {error}") from None
    if not lines:
        raise ValueError(f"{path} is empty: expected one text per line")
    return lines


def _require_folder(path):
    os.listdir(path)  # says what is wrong, before a model is loaded


def _fields(instance, *without):
    import dataclasses

    names = (field.name for field in dataclasses.fields(instance))
    return {name: getattr(instance, name) for name in names if name not in without}


def _cut(text, width):
    return text if len(text) <= width else text[: width - 1] + "…"


def _print_json(value):
    print(json.dumps(value, indent=1))
