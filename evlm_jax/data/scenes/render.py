"""A room as a picture, by VTK.

Models are kept in memory, once for all of their copies. OpenGL draws for one thread at a time."""

import functools
import random
import threading

import numpy as np
from PIL import Image

from evlm_jax.assets import AssetError
from evlm_jax.data.scenes.room import VIEW, Room, Spot

FINE = 2  # a picture is drawn so many times as large, and made small
KEPT = 64  # models in memory
LOCK = threading.Lock()  # of all that asks VTK for something
TEXELS, METRE = 256, 128  # of a floor's or a wall's pattern, and so many of them are a metre


def paint(room: Room, look: str, standing: list[tuple[str, Spot]], size: int) -> Image.Image:
    """RGB of a room of this look and the models (file, spot) that stand in it.

    Raises AssetError as `painter` does.
    """
    pixels = painter().paint(room, look, standing, size * FINE)
    return Image.fromarray(pixels).reduce(FINE)


def painter() -> "Painter":
    """The one of this process.

    Raises AssetError where VTK is not installed, or has nothing to draw with.
    """
    with LOCK:
        return _painter()


@functools.cache
def _painter() -> "Painter":
    try:
        import vtkmodules  # noqa: F401 -- takes long to import, and is an extra
    except ModuleNotFoundError as error:
        raise AssetError('rooms need VTK: python -m pip install "evlm_jax[rooms]"') from error
    return Painter()


class Painter:
    """Owns a window that nobody sees."""

    def __init__(self):
        from vtkmodules import vtkRenderingOpenGL2  # noqa: F401 -- registers what draws
        from vtkmodules.vtkCommonCore import vtkLogger, vtkObject
        from vtkmodules.vtkRenderingCore import vtkRenderer, vtkRenderWindow

        vtkObject.GlobalWarningDisplayOff()
        vtkLogger.SetStderrVerbosity(vtkLogger.VERBOSITY_OFF)
        self.window = vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.renderer = vtkRenderer()
        self.window.AddRenderer(self.renderer)
        self.window.Initialize()
        if not self.window.IsCurrent():
            raise AssetError(
                "rooms are drawn by OpenGL without a screen, and there is none here; Debian has it"
                " in libegl1 and libgl1-mesa-dri"
            )
        self.window.ReleaseCurrent()  # to whichever thread paints
        self.model = functools.lru_cache(KEPT)(self._model)

    def paint(self, room: Room, look: str, standing, size: int) -> np.ndarray:
        """[size, size, 3] uint8."""
        from vtkmodules.util.numpy_support import vtk_to_numpy
        from vtkmodules.vtkRenderingCore import vtkWindowToImageFilter

        with LOCK:
            self.window.MakeCurrent()
            if not self.window.IsCurrent():  # VTK would return what another thread drew
                raise RuntimeError("another thread of this process keeps OpenGL's context")
            self.renderer.RemoveAllViewProps()
            self.renderer.RemoveAllLights()
            for actor in walls(room, random.Random(look)):
                self.renderer.AddActor(actor)
            for path, spot in standing:
                for part in self.model(path):
                    self.renderer.AddActor(_stood(part, spot))
            _light(self.renderer, room)
            _look(self.renderer.GetActiveCamera(), room)
            self.window.SetSize(size, size)
            self.window.Render()
            taken = vtkWindowToImageFilter()
            taken.SetInput(self.window)
            taken.ReadFrontBufferOff()
            taken.Update()
            pixels = vtk_to_numpy(taken.GetOutput().GetPointData().GetScalars())
            pixels = pixels.reshape(size, size, -1)[::-1, :, :3].copy()
            self.window.ReleaseCurrent()
        return pixels

    def _model(self, path: str) -> list:
        """The parts of a Wavefront file."""
        from vtkmodules.vtkIOImport import vtkOBJImporter
        from vtkmodules.vtkRenderingCore import vtkRenderWindow

        reader, window, folder = vtkOBJImporter(), vtkRenderWindow(), path.removesuffix(".obj")
        window.SetOffScreenRendering(1)
        reader.SetRenderWindow(window)
        reader.SetFileName(path)
        reader.SetFileNameMTL(f"{folder}.mtl")
        reader.SetTexturePath(folder)
        reader.Update()
        parts = window.GetRenderers().GetFirstRenderer().GetActors()
        parts = [parts.GetItemAsObject(i) for i in range(parts.GetNumberOfItems())]
        for part in parts:
            _matt(part.GetProperty())
        return parts


def _stood(part, spot: Spot):
    """A copy of a part of a model, which shares its shape and its looks, in its spot."""
    from vtkmodules.vtkCommonTransforms import vtkTransform
    from vtkmodules.vtkRenderingCore import vtkActor

    actor, move = vtkActor(), vtkTransform()
    actor.SetMapper(part.GetMapper())
    actor.SetProperty(part.GetProperty())
    actor.SetTexture(part.GetTexture())
    move.Translate(spot.x, 0, spot.z)
    move.RotateY(np.degrees(spot.angle))
    actor.SetUserTransform(move)
    return actor


def walls(room: Room, rng: random.Random):
    """Floor, back and both sides, with patterns and colours of a look."""
    wide, deep, high, front = room.width / 2, room.depth, room.height, 3.0
    floor, wall = _pattern(rng, (60, 190)), _pattern(rng, (110, 215))
    yield _plane((-wide, 0, front), (2 * wide, 0, 0), (0, 0, -deep - front), floor)
    yield _plane((-wide, 0, -deep), (2 * wide, 0, 0), (0, high, 0), wall)
    yield _plane((-wide, 0, front), (0, 0, -deep - front), (0, high, 0), wall)
    yield _plane((wide, 0, -deep), (0, 0, deep + front), (0, high, 0), wall)
    yield _plane((-wide, high, -deep), (2 * wide, 0, 0), (0, 0, deep + front), wall * 0 + 245)


def _pattern(rng: random.Random, brightness: tuple[int, int]) -> np.ndarray:
    """[TEXELS, TEXELS, 3] uint8, to be laid side by side: plain, stripes or tiles."""
    grey = rng.uniform(*brightness)
    colour = np.clip([grey + rng.uniform(-45, 45) for _ in range(3)], 0, 255)
    kind, parts, contrast = rng.choice(["plain", "stripes", "tiles"]), rng.choice([2, 4, 8]), 0.12
    shades = np.array([[1 + rng.uniform(-contrast, contrast) for _ in range(8)] for _ in range(8)])
    shades = shades[:parts, :parts] if kind == "tiles" else shades[:1, :parts]
    shades = np.ones((1, 1)) if kind == "plain" else shades
    cells = np.kron(shades, np.ones((TEXELS // shades.shape[0], TEXELS // shades.shape[1])))
    return np.clip(cells[..., None] * colour, 0, 255).astype(np.uint8)


def _plane(origin, along, up, pattern: np.ndarray):
    """A textured rectangle."""
    from vtkmodules.util.numpy_support import numpy_to_vtk
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkFiltersSources import vtkPlaneSource
    from vtkmodules.vtkRenderingCore import vtkActor, vtkPolyDataMapper, vtkTexture

    plane, mapper, actor, texture = vtkPlaneSource(), vtkPolyDataMapper(), vtkActor(), vtkTexture()
    origin, along, up = (np.array(vector, float) for vector in (origin, along, up))
    plane.SetOrigin(*origin)
    plane.SetPoint1(*(origin + along))
    plane.SetPoint2(*(origin + up))
    plane.Update()
    places = plane.GetOutput().GetPointData().GetTCoords()
    times = [np.linalg.norm(side) * METRE / TEXELS for side in (along, up)]
    for i in range(places.GetNumberOfTuples()):
        places.SetTuple2(i, *(np.array(places.GetTuple2(i)) * times))
    image = vtkImageData()
    image.SetDimensions(TEXELS, TEXELS, 1)
    image.GetPointData().SetScalars(numpy_to_vtk(pattern.reshape(-1, 3), deep=True))
    texture.SetInputData(image)
    texture.RepeatOn()
    texture.InterpolateOn()
    texture.MipmapOn()
    mapper.SetInputData(plane.GetOutput())
    actor.SetMapper(mapper)
    actor.SetTexture(texture)
    _matt(actor.GetProperty())
    return actor


def _matt(surface) -> None:
    """Of its own colour wherever light comes from: files disagree about what is ambient."""
    surface.SetAmbientColor(surface.GetDiffuseColor())
    surface.SetAmbient(0.35)
    surface.SetDiffuse(0.65)
    surface.SetSpecular(min(surface.GetSpecular(), 0.2))


def _light(renderer, room: Room) -> None:
    """A lamp below the ceiling, and light from where the camera is."""
    from vtkmodules.vtkRenderingCore import vtkLight

    for at, strength in (((0, room.height - 0.2, -room.depth / 2), 0.6), ((0, room.eyes, 0), 0.6)):
        light = vtkLight()
        light.SetLightTypeToSceneLight()
        light.SetPositional(True)
        light.SetConeAngle(180)
        light.SetPosition(*at)
        light.SetFocalPoint(at[0], 0, at[2] - 0.1)
        light.SetIntensity(strength)
        renderer.AddLight(light)


def _look(camera, room: Room) -> None:
    camera.SetPosition(0, room.eyes, 0)
    camera.SetFocalPoint(0, room.eyes - np.sin(room.pitch), -np.cos(room.pitch))
    camera.SetViewUp(0, 1, 0)
    camera.SetViewAngle(np.degrees(VIEW))
    camera.SetClippingRange(0.1, room.depth + room.width + 10)
