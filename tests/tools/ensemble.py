"""Prompt ensembling against OpenAI's recipe: `python tests/tools/ensemble.py ViT-B-32.pt`.

The script builds a zero-shot classifier of a checkpoint twice, in two processes: with `zero_shot_classifier`, and in
PyTorch, with OpenAI's model and tokenizer, class by class and at full length, as OpenAI's notebook
Prompt_Engineering_for_ImageNet does. It prints the largest difference, relative to the classifier's largest weight.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [ROOT, os.path.join(ROOT, "convert"), HERE]

import numpy as np

CLASSES = ["tench", "goldfish", "great white shark", "a", "jack-o'-lantern", "Ærøskøbing 3/4", "bottle cap, or “lid”"]
CLASSES += ["red and white triangle with person digging / construction / road work warning", "dog", "toilet paper"]


def compare(checkpoint, classes=CLASSES):
    """{dtype: the largest difference of the classifiers, relative to PyTorch's largest weight}."""
    from paddle_clip import IMAGENET_TEMPLATES, load, zero_shot_classifier

    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "expected.npz")
        command = [sys.executable, __file__, str(checkpoint), "--torch", output, *classes]
        subprocess.run(command, check=True)
        with np.load(output) as arrays:
            for dtype, expected in arrays.items():  # [E, K]
                model, _ = load(checkpoint, dtype=dtype, activation="quickgelu")
                found = zero_shot_classifier(model, classes, IMAGENET_TEMPLATES).numpy()
                assert found.shape == expected.shape and found.dtype == expected.dtype == dtype
                differences[dtype] = np.abs(found - expected).max() / np.abs(expected).max()
    return differences


def recipe(checkpoint, output, classes):
    """Writes OpenAI's classifiers, {dtype: [E, K]}, made in PyTorch."""
    import torch

    import reference

    with open(os.path.join(ROOT, "paddle_clip", "data", "prompts.json"), encoding="utf-8") as file:
        templates = json.load(file)["ImageNet"]["templates"]
    tokenizer = reference.openai("simple_tokenizer").SimpleTokenizer()
    start, end = tokenizer.encoder["<|startoftext|>"], tokenizer.encoder["<|endoftext|>"]
    classifiers = {}
    for dtype in ("float32", "float64"):
        model, columns = reference.load(checkpoint, dtype), []
        with torch.no_grad():
            for name in classes:
                tokens = torch.zeros(len(templates), model.context_length, dtype=torch.int64)
                for row, template in zip(tokens, templates):
                    ids = [start, *tokenizer.encode(template.format(name)), end]
                    row[: len(ids)] = torch.tensor(ids)
                features = model.encode_text(tokens)
                features = features / features.norm(dim=-1, keepdim=True)
                mean = features.mean(dim=0)
                columns.append(mean / mean.norm())
        classifiers[dtype] = torch.stack(columns, dim=1).numpy()
    np.savez(output, **classifiers)


def make(path):
    """Writes a small checkpoint of random weights that knows all tokens."""
    from dataclasses import replace

    import torch

    import reference
    from variants import VIT

    torch.save(reference.random_model(replace(VIT, context_length=77, vocab_size=49408)).state_dict(), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--make", action="store_true", help="write a small checkpoint there")
    parser.add_argument("--torch", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.checkpoint)
    elif arguments.torch:
        recipe(arguments.checkpoint, arguments.torch[0], arguments.torch[1:])
    else:
        for dtype, difference in compare(arguments.checkpoint).items():
            print(f"{dtype}: {len(CLASSES)} classes, 80 templates, largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
