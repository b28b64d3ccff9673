"""The captions of the tiny model's drawn world in Chinese; the scenes and pictures are those of tiny_world.py."""

from tiny_world import POSITIONS, choose

COLOURS = {
    "red": ("红色", "红"),
    "orange": ("橙色", "橘色"),
    "yellow": ("黄色", "黄"),
    "green": ("绿色", "绿"),
    "blue": ("蓝色", "蓝"),
    "purple": ("紫色", "紫"),
    "pink": ("粉色", "粉红色"),
    "brown": ("棕色", "褐色"),
    "black": ("黑色", "黑"),
    "white": ("白色", "白"),
    "gray": ("灰色", "灰"),
    "cyan": ("青色", "青"),
}
SHAPES = {
    "circle": ("圆形", "圆"),
    "square": ("正方形", "方块"),
    "triangle": ("三角形", "三角"),
    "star": ("星星", "五角星"),
    "heart": ("心形", "爱心"),
    "cross": ("十字", "十字形"),
    "ring": ("圆环", "环"),
    "diamond": ("菱形", "菱形图案"),
}
COUNTS = {1: "一个", 2: "两个", 3: "三个"}
SIZES = {"small": ("小", "小小的", "很小的"), "large": ("大", "大大的", "很大的")}
WHERE = dict(zip(POSITIONS, ("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角")))
KINDS = ("", "", "清晰的", "糟糕的", "明亮的", "昏暗的", "模糊的", "裁剪过的", "低分辨率的", "干净的")
MEDIA = ("照片", "图片", "图像", "图", "画", "绘画", "素描", "渲染图", "插图", "卡通画", "涂鸦")
OTHERS = ("{}", "{}", "这是{}", "这里有{}", "我看到{}", "看，{}", "图中有{}")

TEMPLATES = ("一张{}的照片", "一张{}的图片", "一幅{}的画", "一张明亮的{}的照片", "这是一个{}", "一个{}", "{}")
PLURAL_TEMPLATES = ("一张几个{}的照片", "一张许多{}的图片", "几个{}的画", "一些{}")


def name(colour, shape):
    """What an object is called: 红色的圆形."""
    return f"{COLOURS[colour][0]}的{SHAPES[shape][0]}"


plural = name  # Chinese has no other form


def _colour(name, random):
    long, short = COLOURS[name]
    return choose(random, (f"{long}的", f"{long}的", long, short))


def caption(scene, mentioned, plain, random):
    """A caption of a scene: colour, shape, one object or several, and the attributes mentioned."""
    thing = _colour(scene.colour, random) + choose(random, SHAPES[scene.shape])
    if "size" in mentioned:
        thing = choose(random, SIZES[scene.size]) + thing
    if scene.plural:
        thing = (
            COUNTS[scene.count] if "count" in mentioned else choose(random, ("几个", "一些", "许多", "好几个"))
        ) + thing
    else:
        thing = choose(random, ("一个", "一个", "这个", "")) + thing
    if plain:
        return thing
    if "position" in mentioned:
        thing = choose(random, ("{0}的{1}", "在{0}的{1}", "位于{0}的{1}")).format(WHERE[scene.position], thing)
    if "background" in mentioned:
        colour = COLOURS[scene.background][0]
        thing = choose(random, ("{0}背景上的{1}", "{0}背景前的{1}", "{1}，背景是{0}", "{1}，{0}的背景")).format(
            colour, thing
        )
    template = choose(random, OTHERS)
    if random.random() < 0.6:
        template = choose(random, ("一张", "一幅", "")) + choose(random, KINDS) + "{}的" + choose(random, MEDIA)
    return template.format(thing) + choose(random, ("", "。"))


def about(scene, attribute, value):
    """A caption of a scene: colour, shape, and one more attribute, with the given value."""
    thing = name(scene.colour, scene.shape)
    if attribute == "count":
        return f"一张{COUNTS[value]}{thing}的照片"
    if attribute == "size":
        return f"一张{SIZES[value][0]}{thing}的照片"
    if attribute == "position":
        return f"一张{WHERE[value]}的{thing}的照片"
    return f"一张{COLOURS[value][0]}背景上的{'几个' if scene.plural else ''}{thing}的照片"
