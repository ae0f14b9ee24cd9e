"""All kinds of generators by name, in a cascade's order of preference.

Requests choose a generator by the same name.
"""

from components.sampling.generator import Generator
from components.sampling.generators.diffusion import Diffusion
from components.sampling.generators.image_to_image import ImageToImage
from components.sampling.generators.one_model import GAN, VAE, Pixels
from components.sampling.generators.tokens import Tokens

GENERATORS: dict[str, type[Generator]] = {
    kind.name: kind for kind in (Diffusion, Tokens, Pixels, GAN, VAE, ImageToImage)
}
