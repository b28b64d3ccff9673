"""Writes api.md and api_cn.md, the reference of the public names, from their docstrings: python docs/make_api.py."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import paddle_clip

TOPICS = {  # {room of the package: its heading in English and in Chinese}
    "hub": ("Models", "模型"),
    "model": ("Networks", "网络"),
    "bert": ("The text tower of Chinese-CLIP", "Chinese-CLIP 的文本塔"),
    "config": ("Sizes of a model", "模型的尺寸"),
    "presets": ("Architectures with random weights", "随机权重的各个架构"),
    "tokenizer": ("Texts", "文本"),
    "transforms": ("Pictures", "图像"),
    "images": ("Sample pictures", "示例图片"),
    "zeroshot": ("Zero-shot classification", "零样本分类"),
    "features": ("Features and search", "特征与检索"),
    "bulk": ("Features in many processes", "多进程提取特征"),
    "probe": ("Linear probe", "线性探测"),
    "training": ("Fine-tuning", "微调"),
    "adapting": ("Forgetting less", "少遗忘一些"),
    "recall": ("Retrieval", "图文检索"),
    "pairs": ("Pairs of images and captions", "图文对"),
    "losses": ("Loss", "损失函数"),
    "deploy": ("Deployment", "部署"),
    "engines": ("Exported models", "导出的模型"),
    "compiled": ("Compiled forms in the cache", "缓存中的编译结果"),
    "encoding": ("What encodes", "编码器接口"),
    "checkpoints.conversion": ("Files of weights", "权重文件"),
    "errors": ("Errors", "异常"),
}
INTRODUCTION = (
    "# Reference\n\n[简体中文](api_cn.md) · [all pages](README.md)\n\n"
    "All public names of `paddle_clip`, by topic. This page is made from the docstrings, by `python docs/make_api.py`.",
    "# 接口参考\n\n[English](api.md) · [全部页面](README_cn.md)\n\n"
    "`paddle_clip` 的全部公开接口，按主题排列。本页由 `python docs/make_api.py` 从文档字符串生成，说明是英文。",
)
SECTIONS = {  # of a docstring
    "Args": "参数",
    "Attributes": "属性",
    "Returns": "返回值",
    "Yields": "产出",
    "Raises": "异常",
}
_SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):$", re.MULTILINE)
_ITEM = re.compile(r"^    (?=\S)", re.MULTILINE)


def page(language: int) -> str:
    """The page in English, 0, or Chinese, 1."""
    parts = [INTRODUCTION[language]]
    for room, headings in TOPICS.items():
        names = sorted(name for name, home in paddle_clip._ROOM_OF.items() if home == room)
        entries = (entry(name, getattr(paddle_clip, name), language) for name in names)
        parts += [f"## {headings[language]}", *entries]
    return "\n\n".join(parts) + "\n"


def entry(name: str, value: Any, language: int) -> str:
    """A name, how it is called, and what its docstring says."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):  # one of the tuples
        return f"### `{name}`\n\n`{type(value).__name__}`, {len(value)}"
    parts = [f"### `{called(name, value)}`", text_of(value, language)]
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
                parts += [f"#### `{name}.{called(method, function)}`", text_of(function, language)]
    return "\n\n".join(parts)


def called(name: str, value: Any) -> str:
    """The call of a function or class, without types; the name alone of an error."""
    if inspect.isclass(value) and (issubclass(value, Exception) or getattr(value, "_is_protocol", False)):
        return name
    shown = []
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        default = getattr(parameter.default, "__name__", repr(parameter.default))  # a function has a name
        shown.append(parameter.name + ("" if parameter.default is parameter.empty else f"={default}"))
    return f"{name}({', '.join(shown)})"


def text_of(value: Any, language: int) -> str:
    """A docstring as Markdown: its sections are headed, and their items are lists."""
    start, *sections = _SECTION.split(inspect.getdoc(value) or "")
    parts = [start.strip("\n")]
    for title, content in zip(sections[::2], sections[1::2]):
        heading = SECTIONS[title] if language else title
        items = [" ".join(item.split()) for item in _ITEM.split(content.split("\n\n")[0]) if item.strip()]
        is_list = title in ("Args", "Attributes", "Raises")
        lines = [re.sub(r"^([\w, ]+): ", r"- `\1`: ", item) for item in items] if is_list else [" ".join(items)]
        rest = content.strip("\n").split("\n\n")[1:]
        parts += [f"**{heading}**", "\n".join(lines), *(inspect.cleandoc(part) for part in rest)]
    return "\n\n".join(part.rstrip() for part in parts)


if __name__ == "__main__":
    for language, name in enumerate(("api.md", "api_cn.md")):
        (DOCS / name).write_text(page(language), encoding="utf-8")
