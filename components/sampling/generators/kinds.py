"""Every kind of generator by the name that requests choose it by, in the order in which a cascade prefers them."""

from components.sampling.generator import Generator
from components.sampling.generators.diffusion import Diffusion
from components.sampling.generators.gan import GAN
from components.sampling.generators.image_to_image import ImageToImage
from components.sampling.generators.pixels import Pixels
from components.sampling.generators.tokens import Tokens
from components.sampling.generators.vae import VAE

GENERATORS: dict[str, type[Generator]] = {
    kind.name: kind for kind in (Diffusion, Tokens, Pixels, GAN, VAE, ImageToImage)
}
