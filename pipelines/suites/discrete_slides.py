"""The lecture's slides before diffusion, in its order: formula, slip, code, recipes whose results stand there."""

from components.evaluation.gallery import INDEX_GRIDS
from pipelines.suites.formula_code import code_at
from pipelines.suites.lecture_page import Slide

TAXONOMY, VQ_VAE, PRIORS, VQ_GAN, DALLE = (
    "Taxonomy",
    "VQ-VAE",
    "VQ-VAE + PixelCNN",
    "VQ-GAN",
    "DALL-E",
)

DISCRETE_SLIDES = (
    Slide(
        chapter=TAXONOMY,
        title="Autoregressive image generation: PixelRNN, PixelCNN",
        text="Explicit density: one factor for each value of each pixel, and the likelihood of training data itself is "
        "maximized. Masks hide from each position what comes after it.",
        formulas=(
            r"p_\theta(x) = \prod_{i=1}^{n} p_\theta(x_i \mid x_1, \dots, x_{i-1})",
            r"L = -\frac{1}{n} \sum_{i=1}^{n} \log\, p_\theta(x_i \mid x_{<i})",
        ),
        code=(
            code_at("training/tasks/pixels.py", "PixelTask.loss", "token_loss("),
            code_at("models/masked.py", "RowConv2d.__init__", "visible[:, :, 0, -1]"),
            code_at("models/pixelcnn.py", "gate", "signal.tanh()"),
        ),
        recipes=("pixelcnn", "pixelrnn", "fashion_pixelcnn"),
    ),
    Slide(
        chapter=TAXONOMY,
        title="Variational autoencoder",
        text="Explicit density: a lower bound of the likelihood is maximized. Here it is reported as bits/dim of 8-bit "
        "values, so the reconstruction term is a likelihood of those.",
        formulas=(
            r"\log\, p_\theta(x) \geq \mathbb{E}_{q(z|x)} \log\, p_\theta(x|z) - D_{\mathrm{KL}}(q(z|x) \,\|\, p(z))",
            r"D_{\mathrm{KL}} = \frac{1}{2} \sum \left( \mu^2 + \sigma^2 - 1 - \log\, \sigma^2 \right)",
        ),
        code=(
            code_at("models/bottleneck.py", "GaussianBottleneck.forward", "kl = 0.5"),
            code_at("training/tasks/autoencoder.py", "AutoencoderTask.bits_per_dim", "return ("),
        ),
        recipes=("vae", "vae_gan"),
    ),
    Slide(
        chapter=TAXONOMY,
        title="Generative adversarial network",
        text="Implicit density: only sampling is learned. The hinge losses and the projection discriminator are "
        "those of "
        "BigGAN, the lecture's yardstick.",
        formulas=(
            r"L_D = \frac{1}{2}\left[\mathbb{E}\max(0, 1 - D(x)) + \mathbb{E}\max(0, 1 + D(G(z)))\right]",
            r"L_G = -\mathbb{E}\, D(G(z)), \qquad D(x, y) = \psi(\varphi(x)) + e_y \cdot \varphi(x)",
        ),
        code=(
            code_at("models/losses/adversarial.py", "hinge_discriminator_loss", "return 0.5"),
            code_at("models/gan.py", "ProjectionDiscriminator.forward", "(self.embedding(label) * features)"),
        ),
        recipes=("gan",),
    ),
    Slide(
        chapter=VQ_VAE,
        title="Codebook and index grid",
        text="The encoder's features are replaced by the nearest of N codes, and an image becomes a grid of their "
        "numbers. Near "
        "codes have near colors here: red, green and blue are the ranks of the codes' first three principal "
        "components.",
        code=(code_at("models/autoencoder.py", "Autoencoder.tokenize", "indices = self.encode(image).indices"),),
        recipes=("vqvae",),
        shows=(INDEX_GRIDS,),
    ),
    Slide(
        chapter=VQ_VAE,
        title="Posterior categorical distribution",
        text="Each latent is replaced by its nearest code. The two slides differ by a square that moves no minimum.",
        formulas=(
            r"q(z = k|x) = \begin{cases} 1 & \text{for } k = \operatorname{argmin}_j \|z_e(x) - e_j\|_2 \\ "
            r"0 & \text{otherwise} \end{cases}",
            r"z_q(x) = e_k \quad \text{where} \quad k = \operatorname{argmin}_j \|z_e(x) - e_j\|_2^2",
        ),
        code=(code_at("models/quantizer.py", "nearest_codes", "distances = torch.addmm"),),
    ),
    Slide(
        chapter=VQ_VAE,
        title="Reconstruction loss",
        formulas=(r"L = -\log\, p(x|z_q(x))",),
        code=(code_at("training/tasks/autoencoder.py", "AutoencoderTask.losses", "nll_loss = reconstruction_loss"),),
    ),
    Slide(
        chapter=VQ_VAE,
        title="Codebook alignment and commitment loss",
        text="The first added term moves the codes to the latents, the second keeps the latents near their codes. A "
        "codebook "
        "may follow averages of its latents in place of the first.",
        formulas=(
            r"L = -\log\, p(x|z_q(x)) + \|\operatorname{sg}[z_e(x)] - e\|_2^2 + \beta \|z_e(x) - "
            r"\operatorname{sg}[e]\|_2^2",
        ),
        slip="Three slides print + log p(x|z_q(x)); a loss is lowered, so it is −log p, as on the slide before.",
        code=(
            code_at("models/quantizer.py", "VectorQuantizer.forward", 'losses = {"codebook_loss"'),
            code_at("models/quantizer.py", "EMAQuantizer.update_codebook", "self.codebook.copy_("),
        ),
    ),
    Slide(
        chapter=VQ_VAE,
        title="Gradient through the nearest code",
        text="argmin has no gradient: that of the code is handed to the latent as it is.",
        formulas=(r"z_q(x) = z_e(x) + \operatorname{sg}[e_k - z_e(x)]",),
        code=(code_at("models/quantizer.py", "_straight_through", "e + (z - z.detach())"),),
    ),
    Slide(
        chapter=VQ_VAE,
        title="VQ-VAE reconstruction",
        text="As in the slide's figure: 128² pixels through a grid of 32² codes of K = 512, and back. Codes that start "
        "nearly equal collapse to a few; these start as latents of the first batch. Beside it today's remedies: codes "
        "of length 1 that follow averages.",
        recipes=("vqvae", "vqvae_ema"),
    ),
    Slide(
        chapter=VQ_VAE,
        title="Beyond the lecture: finite scalar quantization",
        text="No codebook and no loss for it: each channel is bounded and rounded, and nothing can collapse.",
        formulas=(r"\hat{z}_i = \operatorname{round}\left(f(z_i)\right), \qquad K = \prod_i L_i",),
        code=(code_at("models/bottleneck.py", "ScalarQuantizer.forward", "rounded = bounded"),),
        recipes=("fsq",),
    ),
    Slide(
        chapter=PRIORS,
        title="VQ-VAE + PixelCNN",
        text="After training, an autoregressive distribution is fitted over the index grid in place of the pixels.",
        formulas=(
            r"p_\theta(x) = \prod_{i=1}^{n} p_\theta(x_i|x_1, \dots, x_{i-1}) \;\rightarrow\; "
            r"p_\theta(z) = \prod_{i=1}^{n} p_\theta(z_i|z_1, \dots, z_{i-1})",
        ),
        code=(code_at("training/tasks/pixels.py", "PixelTask.values", 'rearrange(batch["tokens"]'),),
        recipes=("vqvae_pixelcnn",),
    ),
    Slide(
        chapter=VQ_GAN,
        title="VQ-VAE + GAN",
        text="The reconstruction is judged by features of a pretrained network and by a discriminator of patches, "
        "whose weight "
        "follows the ratio of two gradients. The discriminator trains from the first step; only its weight waits.",
        formulas=(
            r"L = L_{\mathrm{rec}} + L_{\mathrm{perceptual}} + L_{\mathrm{VQ}} + \lambda L_{\mathrm{GAN}}",
            r"\lambda = \frac{\|\nabla_{G_L} L_{\mathrm{rec}}\|}{\|\nabla_{G_L} L_{\mathrm{GAN}}\| + \delta}",
        ),
        code=(
            code_at("models/losses/adversarial.py", "adaptive_weight", "return (norms[0]"),
            code_at("models/perceptual.py", "PerceptualLoss.forward", "squared = (_unit(output)"),
        ),
        recipes=("vqgan",),
    ),
    Slide(
        chapter=VQ_GAN,
        title="VQ-VAE + GAN + Transformer",
        text="Tokens are drawn one after another, with a KV cache, guidance and top-k.",
        formulas=(r"p(s|c) = \prod_{i} p(s_i \mid s_{<i}, c)",),
        code=(
            code_at("models/losses/token_likelihood.py", "token_loss", "F.cross_entropy"),
            code_at("sampling/autoregressive.py", "generate", "tokens[i] = draw("),
        ),
        recipes=("vqgan_transformer", "vqgan_transformer_unconditional"),
    ),
    Slide(
        chapter=VQ_GAN,
        title="Conditioned on an image or a depth map",
        text="The tokens of another image, by a tokenizer of its own, stand in front of those that are learned.",
        code=(
            code_at("models/token_network.py", "TokenNetwork._embed_conditions", "self.condition_embedding(condition)"),
        ),
        recipes=("depth_transformer", "image_transformer"),
    ),
    Slide(
        chapter=VQ_GAN,
        title="Beyond the lecture: MaskGIT",
        text="All tokens are masked at first; each of a dozen steps keeps those that the network is surest of.",
        formulas=(
            r"n_s = \left\lfloor N \cos\left(\frac{\pi}{2} \cdot \frac{s}{S}\right) \right\rfloor \text{ masked "
            r"after step } s",
        ),
        code=(
            code_at("sampling/maskgit.py", "masked_counts", "math.cos("),
            code_at("sampling/maskgit.py", "maskgit", "confidence = token_log_probabilities"),
        ),
        recipes=("maskgit",),
    ),
    Slide(
        chapter=DALLE,
        title="dVAE",
        text="Codes are drawn from a relaxed categorical distribution whose temperature falls while it trains, and the "
        "likelihood of pixels is a logit-Laplace density.",
        formulas=(
            r"z = \operatorname{softmax}\left((\log\, q(k|x) + g_k) / \tau\right) E, \qquad g_k \sim "
            r"\text{Gumbel}(0, 1)",
            r"\log\, f(x) = -\log(2b) - \log(x(1-x)) - |\operatorname{logit}(x) - \mu| / b",
        ),
        code=(
            code_at("models/bottleneck.py", "GumbelQuantizer.forward", "weights = ((logits + noise)"),
            code_at("models/losses/pixel_likelihood.py", "logit_laplace_nll", "return math.log(2)"),
        ),
        recipes=("dvae",),
    ),
    Slide(
        chapter=DALLE,
        title="One transformer over text and image tokens",
        text="Of several images of a prompt the one is kept that a contrastive encoder finds nearest to it.",
        formulas=(
            r"L = \frac{1}{8} L_{\mathrm{text}} + \frac{7}{8} L_{\mathrm{image}}",
            r"k^* = \operatorname{argmax}_k \; f_{\mathrm{image}}(x_k) \cdot f_{\mathrm{text}}(y)",
        ),
        code=(
            code_at("training/tasks/prior.py", "PriorTask.losses", "(1 - weight) * tokens + weight * text"),
            code_at("sampling/reranker.py", "likeness_to_prompts", "encoder.encode_image(seen)"),
        ),
        recipes=("dalle",),
    ),
)
