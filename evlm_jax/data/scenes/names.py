"""Names that scenes ask for, and the shipped drawings of each: of every emoji one in each hand, of
stamps and pictures of words those that are named here.

Every name has at least four drawings in two styles where all assets of the group `scenes` are
there."""

from collections.abc import Sequence
from typing import NamedTuple

CATEGORIES = ("animal", "food", "vehicle", "thing")  # which Chinese counts by other words


class Name(NamedTuple):
    """What an object is called."""

    en: str
    zh: str
    category: str  # of CATEGORIES
    emoji: str  # its characters
    stamps: Sequence[str] = ()  # files without suffix
    words: Sequence[str] = ()  # GCompris's pictures of words
    plural: str = ""  # where it is not regular


BIRDS, MAMMALS, INSECTS = "animals/birds/", "animals/mammals/", "animals/insects/cartoon/"
FRUIT, MUSIC = "food/fruit/", "hobbies/music/string/"


def _in(folder: str, files: str) -> list[str]:
    return [folder + file for file in files.split()]


NAMES = (
    Name("cat", "猫", "animal", "🐈🐱😺", words=["cat"]),
    Name("dog", "狗", "animal", "🐕🐶🐩", _in(MAMMALS, "dogs/dog"), ["dog"]),
    Name("cow", "奶牛", "animal", "🐄🐮", _in(MAMMALS, "bovines/cow bovines/cow_white"), ["cow"]),
    Name("pig", "猪", "animal", "🐖🐷", _in(MAMMALS, "pig pig_golden"), ["pig"]),
    Name("horse", "马", "animal", "🐎🐴", _in(MAMMALS, "equines/horse"), ["horse"]),
    Name("sheep", "绵羊", "animal", "🐑", _in(MAMMALS, "bovines/sheep"), ["sheep"], "sheep"),
    Name(
        "chicken", "鸡", "animal", "🐔🐓🐤", _in(BIRDS, "chicken_profile hen rooster"), ["chicken"]
    ),
    Name("duck", "鸭子", "animal", "🦆", _in(BIRDS, "duck drake"), ["duck"]),
    Name(
        "rabbit",
        "兔子",
        "animal",
        "🐇🐰",
        _in(MAMMALS, "rodents/rabbit rodents/rabbit-2 rabbit_little"),
        ["rabbit"],
    ),
    Name("mouse", "老鼠", "animal", "🐁🐭", _in(MAMMALS, "rodents/mouse"), ["mouse"], "mice"),
    Name("bear", "熊", "animal", "🐻", _in(MAMMALS, "bears/bear bears/european-bear"), ["bear"]),
    Name("tiger", "老虎", "animal", "🐅🐯", _in(MAMMALS, "cats/tiger cats/tiger_sumatran")),
    Name("lion", "狮子", "animal", "🦁", _in(MAMMALS, "cats/lion cats/lion-2 cats/cartoon/lion")),
    Name("elephant", "大象", "animal", "🐘", _in(MAMMALS, "elephant")),
    Name("giraffe", "长颈鹿", "animal", "🦒", _in(MAMMALS, "giraffe"), ["giraffe"]),
    Name("camel", "骆驼", "animal", "🐫🐪", _in(MAMMALS, "camel/camel camel/dromedary"), ["camel"]),
    Name(
        "kangaroo",
        "袋鼠",
        "animal",
        "🦘",
        _in("animals/marsupials/", "kangaroo"),
        ["kangaroo"],
    ),
    Name("deer", "鹿", "animal", "🦌", _in(MAMMALS, "deer/deer deer/doe deer/caribou"), (), "deer"),
    Name("frog", "青蛙", "animal", "🐸", _in("animals/amphibians/", "frog frog-1"), ["frog"]),
    Name("whale", "鲸鱼", "animal", "🐋🐳", _in(MAMMALS, "aquatic/whale"), ["whale"]),
    Name(
        "fish",
        "鱼",
        "animal",
        "🐟🐠🐡",
        _in("animals/fish/", "coraltrout butterflyfish clownfish moonwrasse stripedfish"),
        ["fish"],
        "fish",
    ),
    Name("snail", "蜗牛", "animal", "🐌", _in(INSECTS, "snail snail2"), ["snail"]),
    Name("butterfly", "蝴蝶", "animal", "🦋", _in(INSECTS, "butterfly"), ["butterfly"]),
    Name("bee", "蜜蜂", "animal", "🐝", _in("animals/insects/", "bee"), ["bee"]),
    Name("owl", "猫头鹰", "animal", "🦉", _in(BIRDS, "owl"), ["owl"]),
    Name("penguin", "企鹅", "animal", "🐧", _in(BIRDS, "penguin little-penguin")),
    Name(
        "apple",
        "苹果",
        "food",
        "🍎🍏",
        _in(FRUIT, "apple_fuji apple_granny_smith apple_green apple_red cartoon/apple"),
        ["apple"],
    ),
    Name("banana", "香蕉", "food", "🍌", _in(FRUIT, "banana cartoon/banana")),
    Name("lemon", "柠檬", "food", "🍋", _in(FRUIT, "lemon cartoon/lemon"), ["lemon"]),
    Name("pear", "梨", "food", "🍐", _in(FRUIT, "pear cartoon/pear"), ["pear"]),
    Name(
        "strawberry",
        "草莓",
        "food",
        "🍓",
        _in(FRUIT, "strawberry Strawberry2 cartoon/strawberry"),
        ["strawberry"],
    ),
    Name("grapes", "葡萄", "food", "🍇", _in(FRUIT, "grapes cartoon/grapes"), (), "grapes"),
    Name("pineapple", "菠萝", "food", "🍍", _in(FRUIT, "pineapple cartoon/pineapple")),
    Name(
        "mushroom",
        "蘑菇",
        "food",
        "🍄",
        ["food/vegetables/mushroom", *_in("plants/mushrooms/", "cep cep-1")],
    ),
    Name("cake", "蛋糕", "food", "🎂🍰🧁", _in("food/dessert/cartoon/", "birthday_cake pink_cake")),
    Name("car", "汽车", "vehicle", "🚗🚙🚘", _in("vehicles/auto/", "sedan beetle sportscar2")),
    Name(
        "bus",
        "公交车",
        "vehicle",
        "🚌🚍🚎",
        _in("vehicles/masstransit/", "green_korean_bus cartoon/double_decker_bus"),
    ),
    Name("truck", "卡车", "vehicle", "🚚🚛🛻", _in("vehicles/auto/", "truck")),
    Name("train", "火车", "vehicle", "🚂🚆🚄", _in("vehicles/locomotive/cartoon/", "toy_train")),
    Name("guitar", "吉他", "thing", "🎸", _in(MUSIC, "guitar_classical guitar_electric guitar2")),
)
PHOTOGRAPHS = {  # of GCompris, which no scene shows
    "cat": "cat kitten",
    "dog": "dog",
    "cow": "cow calf",
    "pig": "pig",
    "horse": "horse horse-2",
    "sheep": "sheep",
    "chicken": "chicken",
    "duck": "duck",
    "bear": "polar_bear",
    "giraffe": "giraffe giraffe-2",
    "camel": "camels",
    "kangaroo": "kangaroo",
    "butterfly": "butterfly",
    "bee": "bee",
    "owl": "owl",
    "penguin": "penguin",
}
