"""What rendered rooms are made of, split by identity as cut-outs and photographs are: models of
every name, looks of rooms and fonts are each of train, validation or test."""

from evlm_jax import assets
from evlm_jax.data.scenes.material import SPLITS, Drawing, Material, divided, fonts
from evlm_jax.data.scenes.names import Name
from evlm_jax.data.scenes.room import hulls

ASSET = "furniture"
LOOKS = tuple(f"room {number}" for number in range(200))
NAMES = (
    Name("chair", "椅子", "thing", ""),
    Name("armchair", "扶手椅", "thing", ""),
    Name("sofa", "沙发", "thing", ""),
    Name("table", "桌子", "thing", ""),
    Name("bed", "床", "thing", ""),
    Name("stool", "凳子", "thing", ""),
    Name("wardrobe", "衣柜", "thing", ""),
    Name("bookcase", "书柜", "thing", ""),
    Name("bench", "长凳", "thing", ""),
    Name("lamp", "灯", "thing", ""),
    Name("plant", "盆栽", "thing", ""),
    Name("toilet", "马桶", "thing", ""),
    Name("bathtub", "浴缸", "thing", ""),
    Name("fridge", "冰箱", "thing", ""),
    Name("woman", "女人", "thing", "", plural="women"),
    Name("man", "男人", "thing", "", plural="men"),
    Name("trash can", "垃圾桶", "thing", ""),
    Name("radiator", "暖气片", "thing", ""),
)


def furnished(split: str) -> Material:
    """Of the group `rooms`.

    Raises:
      ValueError: a split that rooms do not have.
      AssetError: it was not fetched.
    """
    of_models, of_looks = SPLITS[split]
    if split in ("style", "all"):
        raise ValueError(f"rooms: split {split} is of cut-outs alone")
    folder, drawings, chosen = assets.path(ASSET), {}, {}
    every = hulls(str(folder))
    for name in NAMES:
        part = divided(every[name.en])
        own = {
            str(folder / path): hull
            for path, hull in sorted(every[name.en].items())
            if part[path] == of_models
        }
        drawings[name.en] = tuple(Drawing(name.en, path) for path in own)
        chosen |= own
    part = divided(LOOKS)
    grounds = tuple(look for look in LOOKS if part[look] == of_looks)
    names = {name.en: name for name in NAMES}
    return Material(names, drawings, grounds, fonts(of_looks), chosen)
