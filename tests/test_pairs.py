"""The sources of (image, caption) pairs, and the messages where there are none."""

import json

import pytest
from PIL import Image

from paddle_clip import read_pairs


@pytest.fixture
def write(tmp_path):
    """A function writing an image or a text into the test's folder."""

    def call(name, text=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            Image.new("RGB", (4, 4)).save(path)
        else:
            path.write_text(text, encoding="utf-8")
        return str(path)

    return call


def test_csv(write):
    images = [write("images/b.png"), write("images/a.png")]
    csv = write("x.csv", '\ufefftitle,caption,image\r\n1,"a dog, a cat",images/b.png\r\n2,犬,images/a.png\r\n')
    assert read_pairs(csv) == [(images[0], "a dog, a cat"), (images[1], "犬")]


@pytest.mark.parametrize("table", ["filepath\ttitle\na.png\tred, blue\n", 'text,file_name\n"red, blue",a.png\n'])
def test_tables_of_other_tools(write, table):
    image = write("a.png")
    assert read_pairs(write("x.csv", table)) == [(image, "red, blue")]


def test_columns_by_name(write):
    image, table = write("a.png"), write("x.csv", "image,caption,pic,words\nb.png,no,a.png,yes\n")
    assert read_pairs(table, image_column="pic", caption_column="words") == [(image, "yes")]
    with pytest.raises(ValueError, match=r"needs the columns nope and caption .*image_column"):
        read_pairs(table, image_column="nope")


def test_captions_beside_images(write, tmp_path):
    images = [write("a.png"), write("more/b.JPG")]
    write("more/b.txt", "two\nlines \n")
    write("a.txt", "one")
    write("notes.md", "no image")
    assert read_pairs(tmp_path) == [(images[0], "one"), (images[1], "two lines")]


def test_a_folder_per_class(write, tmp_path):
    images = [write("polar_bear/1.png"), write("polar_bear/deep/2.png"), write("zebra {}/3.png")]
    captions = ["a photo of a polar bear.", "a photo of a polar bear.", "a photo of a zebra {}."]
    assert read_pairs(tmp_path) == list(zip(images, captions))
    assert read_pairs(tmp_path, "art of {}")[0] == (images[0], "art of polar bear")


def test_nothing_there(write, tmp_path):
    with pytest.raises(ValueError, match="has no images"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match=r"empty\.csv needs the columns image and caption.*; found none"):
        read_pairs(write("empty.csv", ""))
    with pytest.raises(ValueError, match=r"head\.csv holds no \(image, caption\) pairs"):
        read_pairs(write("head.csv", "image,caption\n"))
    with pytest.raises(OSError, match=r"missing\.csv"):
        read_pairs(tmp_path / "missing.csv")


def test_wrong_tables(write):
    with pytest.raises(ValueError, match=r"needs the columns image and caption .*; found path, title"):
        read_pairs(write("x.csv", "path,title\na.png,a\n"))
    with pytest.raises(ValueError, match=r"is not a text in UTF-8: .*iconv"):
        read_pairs(write("x.png"))


def test_missing_images_and_captions_are_counted_and_named(write):
    write("a.png")
    rows = "".join(f"{number}.png,x\n" for number in range(7))
    with pytest.raises(ValueError, match=r"7 images named in .*x\.csv do not exist: .*/0\.png, .*4\.png and 2 more$"):
        read_pairs(write("x.csv", "image,caption\na.png,here\n" + rows))
    with pytest.raises(ValueError, match=r"2 images of .* have empty captions: .*a\.png, .*a\.png$"):
        read_pairs(write("x.csv", "image,caption\na.png, \na.png\n"))


def test_folders_that_are_half_one_thing(write, tmp_path):
    write("cat/a.png")
    write("b.png")
    with pytest.raises(ValueError, match=r"1 images of .* have neither a text file .* nor a folder .*: .*b\.png"):
        read_pairs(tmp_path)
    write("cat/a.txt", "a cat")
    with pytest.raises(ValueError, match=r"1 images of .* have no text file of the same name: .*b\.png"):
        read_pairs(tmp_path)


def test_the_template_has_a_place_for_the_name(write, tmp_path):
    write("cat/a.png")
    with pytest.raises(ValueError, match=r"the template 'a cat' has no \{\}"):
        read_pairs(tmp_path, "a cat")


def test_tables(write, tmp_path):
    """Of three kinds, with the same content."""
    images = [write("images/b.png"), write("images/a.png")]
    rows = [{"image": "images/b.png", "caption": "a dog, a cat", "more": 1}, {"image": "images/a.png", "caption": "犬"}]
    lines = write("x.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert read_pairs(lines) == [(images[0], "a dog, a cat"), (images[1], "犬")]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read_pairs(tmp_path / "x.parquet") == read_pairs(lines)
    parquet.write_table(pyarrow.table({"image": [b"x"], "caption": ["y"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"the column image of .*x.parquet holds binary; expected texts"):
        read_pairs(tmp_path / "x.parquet")
    parquet.write_table(pyarrow.table({"pic": ["x"], "caption": ["y"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="needs the columns image and caption in its schema; found pic, caption"):
        read_pairs(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet is not a parquet file"):
        read_pairs(write("x.parquet", "image,caption"))


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 of .*x.jsonl is not JSON in UTF-8"),
        ("[1]", r"line 2 of .*x.jsonl is \[1\]; expected a JSON object"),
        ('{"image": "a.png"}', "x.jsonl needs the columns image and caption in line 2; found image"),
        ('{"image": "a.png", "caption": null}', "the caption in line 2 of .*x.jsonl is None; expected a text"),
        ('{"image": 3, "caption": "x"}', "the image in line 2 of .*x.jsonl is 3; expected a text"),
    ],
)
def test_lines_that_are_wrong(write, line, message):
    path = write("x.jsonl", '{"image": "a.png", "caption": "x"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_pairs(path)
