"""The table of presets, in the package and in presets.py."""

import dataclasses

import pytest

from paddle_clip import presets

# Published facts, by OpenAI's name: resolution, embedding, layers, width, patch, text width, text heads.
FACTS = {
    "RN50": (224, 1024, (3, 4, 6, 3), 64, None, 512, 8),
    "RN101": (224, 512, (3, 4, 23, 3), 64, None, 512, 8),
    "RN50x4": (288, 640, (4, 6, 10, 6), 80, None, 640, 10),
    "RN50x16": (384, 768, (6, 8, 18, 8), 96, None, 768, 12),
    "RN50x64": (448, 1024, (3, 15, 36, 10), 128, None, 1024, 16),
    "ViT-B/32": (224, 512, 12, 768, 32, 512, 8),
    "ViT-B/16": (224, 512, 12, 768, 16, 512, 8),
    "ViT-L/14": (224, 768, 24, 1024, 14, 768, 12),
    "ViT-L/14@336px": (336, 768, 24, 1024, 14, 768, 12),
}


def test_the_table_holds_the_published_facts():
    assert [row.name for row in presets.PRESETS] == list(FACTS)
    for row in presets.PRESETS:
        c = row.config
        sizes = (c.image_resolution, c.embed_dim, c.vision_layers, c.vision_width, c.vision_patch_size)
        assert (*sizes, c.transformer_width, c.transformer_heads) == FACTS[row.name]
        assert (c.transformer_layers, c.context_length, c.vocab_size) == (12, 77, 49408)
        assert row.file == row.name.replace("/", "-").replace("@", "-") + ".pt"
        assert len(row.sha256) == 64


def test_configs_are_frozen_and_found_by_value():
    config = presets.preset("RN50").config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.embed_dim = 1
    assert presets.preset_of(dataclasses.replace(config)).name == "RN50"
    assert presets.preset_of(dataclasses.replace(config, embed_dim=1)) is None


def test_an_unknown_name_lists_the_known():
    with pytest.raises(
        ValueError, match=r"no model is called 'RN51'; did you mean RN50.* available: RN50, RN101, .*ViT-L/14@336px"
    ):
        presets.preset("RN51")


def test_the_root_door_prints_the_table_without_paddle(run):
    done = run(
        "-c",
        "import sys; sys.modules['paddle'] = None; import runpy; runpy.run_path('presets.py', run_name='__main__')",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["name", "parameters", "resolution", "embed", "dim", "file"]
    assert lines[1].split() == ["RN50", "102,007,137", "224", "1024", "RN50.pt"]
    assert len(lines) == 10
    assert run("-c", "from presets import clip_rn50, CLIPConfig").returncode == 0
