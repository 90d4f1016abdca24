"""Models of furniture and people for rendered rooms, out of Sweet Home 3D's catalogues.

Chosen are names of which there are three models and more that stand on a floor and whose textures
are all there. A catalogue is a zip of Wavefront models beside a list of properties."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evlm_jax.asset_packages import Debian

SWEET_HOME = Debian(
    "sweethome3d-furniture=1.8-1",
    119.8,
    "./usr/share/sweethome3d/furniture/",
    ("*.sh3f",),
    "8543ca008036ebebd7a8367a13a51b4a3f76f71ce634b49bfa7d184e1ef74ebe",
)
CATALOGUES = {  # as MODELS and their names here have them
    "S": "Scopia",
    "R": "Reallusion",
    "K": "KatorLegaz",
    "0": "BlendSwap-CC-0",
    "B": "BlendSwap-CC-BY",
}
MODELS = {  # name -> catalogue:model
    "chair": "S:ext_chair S:chair3 S:chair4 S:chair S:office_chair S:kids_desk_chair"
    " S:white_kitchen_chair S:plastic_chair S:silla_teca K:dining-chair K:office-chair"
    " K:cafe-chair 0:plasticChair 0:sillaBlanca 0:chair 0:antiqueChair 0:chair2 0:designChair"
    " 0:thonet 0:chairWithCushion 0:oakChair B:cafe_set_mota_chair B:cafe_set_tonon_chair"
    " B:ella_chair_f B:leaf_chair B:plaidChair B:kitchenChair B:chair3 B:chair4"
    " B:chairWithCushion",
    "armchair": "S:armchair3 S:armchair S:armchair1 S:armchair2 S:modern_armchair S:rattanArmchair"
    " K:mid-century-chair 0:armchair 0:armchair2 0:modernArmchair 0:winchesterArmchair B:armchair1"
    " B:fotel B:armChair2",
    "sofa": "S:simple_sofa S:leather_sofa S:sofa_white_beige S:burlap_sofa S:clear_sofa"
    " S:rattanSofa K:mid-century-bench-sofa K:mid-century-sofa K:futon-couch 0:sofa2 0:couch"
    " 0:couch2 0:winchesterSofa B:sofa2 B:sofa3 B:couch3",
    "table": "S:table3 S:table4 S:ext_table S:living_room_table S:white_kitchen_table"
    " S:table-with-leaning-feet S:round-table S:saloon_table S:coffee_table"
    " S:table_wood_and_iron S:coffee-table2 S:metal_glass_table S:rattanTable"
    " K:glass-dining-table K:cafe-table K:folding-table 0:table 0:oakTable"
    " 0:tableWithTablecloth B:cafe_set_mota_table B:cafe_set_tonon_table B:table B:coffeeTable",
    "bed": "S:bed1 S:captains-bed S:children_bed S:hospital-bed S:day_bed_frame 0:bed3"
    " 0:bedWithTexture B:lettoCloud B:juniorBed",
    "stool": "K:bar-stool 0:silla2 0:stool 0:stool2 B:green_stool",
    "wardrobe": "S:wardrobe1 0:wardrobeWithSlidingDoors B:wardrobe B:wardrobe2",
    "bookcase": "S:dining_room K:full-bookcase 0:bookcase B:bookcase",
    "bench": "S:wood_bank S:littlebank K:bench K:concrete-bench K:painted-bench 0:bench",
    "lamp": "S:living_lamp S:little_lamp3 K:pedestal-vase-lamp",
    "plant": "S:maceta 0:plant 0:decorativePlant B:decorativePlant B:mediumIndoorPlant"
    " B:yuccaPlant S:ficus",
    "toilet": "0:toiletsUnit B:toilets_unit_jay_hardy B:modernToilet",
    "bathtub": "S:islandBath S:corner_bathtub B:bath_jay_hardy",
    "fridge": "K:fridge 0:largeFridge 0:refrigerator",
    "woman": "R:female01 R:female02 R:female03 R:holdingFemale01 R:holdingFemale02"
    " R:holdingFemale03 K:female-01-casual-clothing",
    "man": "R:male01 R:male02 R:male03 R:holdingMale01 K:male-01-suit",
    "trash can": "K:bullet-trash-can K:park-trashcan K:residential-trashcan",
    "radiator": "0:radiator 0:radiator2 0:radiator3",
}
SIZES = ("width", "height", "depth")  # centimetres, across, up and away, once it is turned


def room_models(raw: Path, out: Path, progress: bool) -> None:
    """CATALOGUE/MODEL.obj with its materials and textures, in metres, y up, the foot in the middle
    of the floor at the origin; and hulls.json: {name: {path: corners of the convex hull [n][3]}}.
    """
    wanted: dict[str, dict[str, str]] = {key: {} for key in CATALOGUES}
    for name, models in MODELS.items():
        for model in models.split():
            key, _, stem = model.partition(":")
            wanted[key][stem] = name
    hulls: dict[str, dict] = {name: {} for name in MODELS}
    for key, names in wanted.items():
        catalogue = CATALOGUES[key]
        with zipfile.ZipFile(raw / f"{catalogue}.sh3f") as archive:
            entries = dict(_entries(archive))
            for stem in tqdm(names, desc=catalogue, disable=not progress):
                path = f"{catalogue}/{stem}.obj"
                hulls[names[stem]][path] = _model(archive, entries[stem], out / path)
    (out / "hulls.json").write_text(json.dumps(hulls), "utf-8")


def _entries(archive: zipfile.ZipFile) -> Iterator[tuple[str, dict[str, str]]]:
    """(name of the file without suffix, properties) of each model of a catalogue."""
    text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
    entries: dict[str, dict[str, str]] = {}
    for field, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
        entries.setdefault(number, {})[field] = value.strip()
    for entry in entries.values():
        yield Path(entry["model"]).stem, entry


def _model(archive: zipfile.ZipFile, entry: dict[str, str], path: Path) -> list[list[float]]:
    """Writes a model with its materials and textures under its own name; returns its hull."""
    from scipy.spatial import ConvexHull  # takes long to import

    file = entry["model"].removeprefix("/")
    folder, text = file.rpartition("/")[0], archive.read(file).decode("latin-1")
    library = re.search(r"^mtllib\s+(.+?)\s*$", text, re.MULTILINE)[1]
    materials = archive.read(f"{folder}/{library}").decode("latin-1")
    textures = path.with_suffix("")
    textures.mkdir(parents=True)
    for picture in set(re.findall(r"^\s*map_Kd\s+(.+?)\s*$", materials, re.MULTILINE)):
        (textures / picture).write_bytes(archive.read(f"{folder}/{picture}"))
    first = materials.index("newmtl")  # VTK dies of a value ahead of it
    path.with_suffix(".mtl").write_text(_named(materials[first:]), "latin-1")
    points, normals = (_vectors(text, kind) for kind in ("v", "vn"))
    turn = np.array(entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split(), float).reshape(3, 3)
    points, faces = points @ turn.T, _faces(text)
    used = sorted({int(corner[0]) - 1 for face in faces for corner in face})
    low, high = points[used].min(0), points[used].max(0)
    scale = np.array([float(entry[side]) for side in SIZES]) / 100 / (high - low)
    points = scale * (points - [(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2])
    normals = normals @ turn.T / scale
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    text = _written(_written(text, "v", points), "vn", normals)
    path.write_text(_with_alike_faces(_named(text), faces), "latin-1")
    return points[used][np.sort(ConvexHull(points[used]).vertices)].round(4).tolist()


def _vectors(text: str, kind: str) -> np.ndarray:
    """All `v` or `vn` [n, 3] of a Wavefront file."""
    found = re.findall(rf"^{kind}\s+(\S+)\s+(\S+)\s+(\S+)", text, re.MULTILINE)
    return np.array(found, float).reshape(-1, 3)


def _faces(text: str) -> list[list[list[str]]]:
    """Corners of each face: the number of the point, of the place in the texture, of the normal."""
    lines = re.findall(r"^f\s+(.+?)\s*$", text, re.MULTILINE)
    faces = ([corner.split("/") for corner in line.split()] for line in lines)
    return [face for face in faces if len(face) > 2]


def _named(text: str) -> str:
    """Materials by names that are no numbers, and no space behind those of files: of either VTK
    loses the texture.
    """
    text = re.sub(r"[ \t\r]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"^(\s*(?:newmtl|usemtl)) +", r"\1 of_", text, flags=re.MULTILINE)


def _with_alike_faces(text: str, faces: list[list[list[str]]]) -> str:
    """Without faces of two corners, and with a place in the texture for all corners or for none:
    VTK ends at the former, and leaves out faces that are unlike the others.
    """
    if textured := any(corner[1:] and corner[1] for face in faces for corner in face):
        text = "vt 0 0\n" + text  # number 1, of corners without one

    def alike(line: re.Match) -> str:
        corners = [corner.split("/") for corner in line[1].split()]
        for corner in corners if textured else ():
            corner[1:2] = [str(int(corner[1]) + 1 if corner[1:] and corner[1] else 1)]
        return " ".join(["f", *map("/".join, corners)]) if len(corners) > 2 else "# no face"

    return re.sub(r"^f\s+(.+?)\s*$", alike, text, flags=re.MULTILINE)


def _written(text: str, kind: str, vectors: np.ndarray) -> str:
    """The file with other vectors, in their order."""
    lines = iter(f"{kind} {x:.5g} {y:.5g} {z:.5g}" for x, y, z in vectors.tolist())
    return re.sub(rf"^{kind}\s.*$", lambda _: next(lines), text, flags=re.MULTILINE)
