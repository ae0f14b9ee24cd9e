"""The lecture's slides from diffusion on, in its order: formula, slip, code, and the recipes whose results stand there.

The slides count steps from 1 to T, the code from 0: its index 0 has seen one noising step.
"""

from components.evaluation.noising_study import ERRORS, FORWARD, PREDICTED, SCHEDULES, VALUES, VARIANCE
from pipelines.suites.formula_code import code_at
from pipelines.suites.lecture_page import Slide

BASICS, OBJECTIVE, IMPROVED, CONDITIONAL, BEYOND = (
    "Diffusion: basics",
    "Diffusion: objective",
    "Diffusion: implementation",
    "Conditional generation",
    "Beyond the lecture",
)

DIFFUSION_SLIDES = (
    Slide(
        chapter=BASICS,
        title="Motivation: Imagen, DALL-E 2, Stable Diffusion",
        text="What the rest of the lecture leads to. Stable Diffusion denoises the latents of an autoencoder, "
        "Imagen listens to "
        "a frozen text encoder, DALL-E 2 first makes an image's embedding out of a text's.",
        formulas=(
            r"z = \mathcal{E}(x) / s, \qquad \hat{x} = \mathcal{D}(s\, z)",
            r"\hat{x}_0 \leftarrow \operatorname{clip}(\hat{x}_0, -s, s) / s, \qquad s = \max(1, \text{quantile of "
            r"} |\hat{x}_0|)",
            r"L_{\mathrm{prior}} = \mathbb{E}_{t, \epsilon} \| f_\theta(z_t, t, y) - z_{\mathrm{image}} \|^2",
        ),
        code=(
            code_at("models/autoencoder.py", "Autoencoder.to_latents", "return self.bottleneck(features).z"),
            code_at("models/diffusion/steps.py", "threshold_dynamically", "quantile"),
            code_at("training/tasks/diffusion_prior.py", "DiffusionPriorTask.losses", 'x_0=batch["image_embedding"]'),
        ),
        recipes=("latent_diffusion", "stable_diffusion", "imagen", "dalle2"),
    ),
    Slide(
        chapter=BASICS,
        title="Forward noising process",
        text="Easy, and fixed: data are destroyed by adding a little noise again and again.",
        recipes=("ddpm",),
        shows=(FORWARD,),
    ),
    Slide(
        chapter=BASICS,
        title="Reverse denoising process",
        text="Samples are made by taking the noise away again and again; this needs a prior about the world. Above "
        "x_t, below "
        "the x_0 that the network sees in it.",
        recipes=("ddpm",),
        shows=("strip_base",),
    ),
    Slide(
        chapter=BASICS,
        title="Diffused data distributions",
        text="All values of held-out images: at first most are of the background, in the end they are normal.",
        recipes=("ddpm",),
        shows=(VALUES, VARIANCE),
    ),
    Slide(
        chapter=BASICS,
        title="Forward diffusion process",
        text="The schedule says how much noise each step adds; ᾱ is the share of the signal's variance that is left.",
        formulas=(
            r"q(x_t|x_{t-1}) = \mathcal{N}(x_t; \sqrt{1 - \beta_t}\, x_{t-1}, \beta_t I), \quad \beta_t \in (0, 1)",
            r"q(x_{1:T}|x_0) = \prod_{t=1}^{T} q(x_t|x_{t-1})",
        ),
        code=(
            code_at("models/diffusion/schedule.py", "linear_betas", "return torch.linspace(first, last"),
            code_at("models/diffusion/schedule.py", "cosine_betas", "alphas_cumprod = ((time"),
        ),
        recipes=("ddpm",),
        shows=(SCHEDULES,),
    ),
    Slide(
        chapter=BASICS,
        title="x_t in one step",
        text="Sums of Gaussians are Gaussian, so all noise up to step t can be added at once.",
        formulas=(
            r"x_t = \sqrt{\bar{\alpha}_t}\, x_0 + \sqrt{1 - \bar{\alpha}_t}\, \epsilon, \qquad \epsilon \sim "
            r"\mathcal{N}(0, I)",
            r"\alpha_t = 1 - \beta_t, \qquad \bar{\alpha}_t = \prod_{i=1}^{t} \alpha_i",
        ),
        code=(
            code_at("models/diffusion/schedule.py", "Schedule.add_noise", "return signal * x_0"),
            code_at("models/diffusion/schedule.py", "Schedule.alphas_cumprod", "return (1 - self.betas)"),
        ),
    ),
    Slide(
        chapter=BASICS,
        title="Reverse diffusion process",
        text="The true reverse step is intractable, but Gaussian where the forward steps are small; a network "
        "learns its mean.",
        formulas=(r"p_\theta(x_{t-1}|x_t) = \mathcal{N}(x_{t-1}; \mu_\theta(x_t, t), \sigma_t^2 I)",),
        code=(code_at("models/diffusion/discrete.py", "DiscreteObjective.log_variance", "return small if"),),
    ),
    Slide(
        chapter=BASICS,
        title="Sampling algorithm, first version",
        formulas=(r"x_{t-1} = \mu_\theta(\epsilon_\theta, x_t, t) + \sigma_t z, \qquad z \sim \mathcal{N}(0, I)",),
        slip="The slide prints σ_t² z. The noise is multiplied by the standard deviation σ_t; σ_t² is the variance "
        "that results.",
        code=(code_at("models/diffusion/samplers.py", "_ancestral", "(0.5 * log_variance).exp() * random"),),
    ),
    Slide(
        chapter=OBJECTIVE,
        title="ELBO objective",
        text="x is the observation x_0, the latent is the whole chain x_1 … x_T.",
        formulas=(
            r"\log\, p_\theta(x) \geq \mathbb{E}_{q(z|x)} \log\, p_\theta(x|z) - D_{\mathrm{KL}}(q(z|x) \,\|\, "
            r"p_\theta(z))",
            r"p_\theta(x_{0:T}) = p(x_T) \prod_{t=1}^{T} p_\theta(x_{t-1}|x_t)",
        ),
        slip="In the derivation the sign of log p_θ(x_T) changes between two lines; −log p_θ(x_T) is right in all "
        "of them.",
        code=(code_at("models/diffusion/variational_bound.py", "Bound.total", "return self.prior"),),
    ),
    Slide(
        chapter=OBJECTIVE,
        title="The variational bound: prior matching, denoising matching, reconstruction",
        text="Each term is in closed form or a likelihood of 8-bit values; together they are bits/dim of held-out "
        "images.",
        formulas=(
            r"-\mathbb{E} \log\, p_\theta(x_0) \leq \mathbb{E}_q\left[ -\log\, p(x_T) - \sum_{t \geq 1} "
            r"\log \frac{p_\theta(x_{t-1}|x_t)}{q(x_t|x_{t-1})} \right] = L_{\mathrm{VLB}}",
            r"L_{\mathrm{VLB}} = \mathbb{E}_q\left[ D_{\mathrm{KL}}(q(x_T|x_0) \| p(x_T)) + \sum_{t > 1} "
            r"D_{\mathrm{KL}}(q(x_{t-1}|x_t, x_0) \| p_\theta(x_{t-1}|x_t)) - \log\, p_\theta(x_0|x_1) \right]",
        ),
        slip="The slide sums over t ≤ 1 in place of t ≥ 1, and writes the upper bound of −log p without its minus; "
        "the line below, "
        "−KL − ΣKL + log p(x_0|x_1), is the lower bound of log p, and what is minimized is its negative.",
        code=(
            code_at("models/diffusion/discrete.py", "DiscreteObjective.bits", "divergence = normal_kl"),
            code_at("models/diffusion/variational_bound.py", "prior_bits", "nats = normal_kl"),
            code_at("models/diffusion/gaussian.py", "discretized_gaussian_nll", "inside = log_high"),
        ),
        recipes=("fashion_likelihood_ddpm", "fashion_likelihood_bound"),
    ),
    Slide(
        chapter=OBJECTIVE,
        title="Closed form of the posterior",
        formulas=(
            r"\tilde{\mu}_t(x_t, x_0) = \frac{\sqrt{\bar{\alpha}_{t-1}}\, \beta_t}{1 - \bar{\alpha}_t} x_0 "
            r"+ \frac{\sqrt{\alpha_t} (1 - \bar{\alpha}_{t-1})}{1 - \bar{\alpha}_t} x_t",
            r"\tilde{\beta}_t = \frac{1 - \bar{\alpha}_{t-1}}{1 - \bar{\alpha}_t} \beta_t",
        ),
        code=(
            code_at("models/diffusion/schedule.py", "Schedule.posterior", "mean = self.at("),
            code_at("models/diffusion/schedule.py", "Schedule.posterior_variance", "return self.betas"),
        ),
    ),
    Slide(
        chapter=OBJECTIVE,
        title="Two Gaussians: a regression of means",
        text="With both variances fixed, the divergence is a squared distance of means; written with the noise, of "
        "noises.",
        formulas=(
            r"L_{t-1} = \mathbb{E}_q\left[ \frac{1}{2\sigma_t^2} \|\tilde{\mu}_t(x_t, x_0) - \mu_\theta(x_t, t)\|^2 "
            r"\right] + C",
            r"\mu_\theta(x_t, t) = \frac{1}{\sqrt{\alpha_t}} \left( x_t - \frac{1 - \alpha_t}{\sqrt{1 - "
            r"\bar{\alpha}_t}} "
            r"\epsilon_\theta(x_t, t) \right)",
        ),
        code=(
            code_at("models/diffusion/gaussian.py", "normal_kl", "return 0.5"),
            code_at("models/diffusion/steps.py", "ddpm_step", "return coef_x_0 * x_0"),
        ),
    ),
    Slide(
        chapter=OBJECTIVE,
        title="L_simple",
        text="The weights before the squared error are left out.",
        formulas=(
            r"L_{\mathrm{simple}} = \mathbb{E}_{x_0, \epsilon, t} \left[ \|\epsilon - \epsilon_\theta(x_t, t)\|^2 "
            r"\right], "
            r"\qquad t \sim U(1, T)",
        ),
        code=(code_at("models/diffusion/discrete.py", "DiscreteObjective.loss", "errors = (prediction"),),
    ),
    Slide(
        chapter=OBJECTIVE,
        title="Sampling algorithm",
        formulas=(
            r"x_{t-1} = \frac{1}{\sqrt{\alpha_t}} \left( x_t - \frac{1 - \alpha_t}{\sqrt{1 - \bar{\alpha}_t}} "
            r"\epsilon_\theta(x_t, t) \right) + \sqrt{\tilde{\beta}_t}\, z",
        ),
        slip="The slide prints β̃_t z. β̃_t is a variance; the noise is multiplied by its root.",
        code=(code_at("models/diffusion/steps.py", "ddpm_log_variances", "math.log(step.posterior_variance), large"),),
    ),
    Slide(
        chapter=OBJECTIVE,
        title="Summary: algorithms 1 and 2",
        text="Training draws an image, a step and noise, and takes a gradient step; sampling walks from noise to an "
        "image.",
        formulas=(
            r"\nabla_\theta \left\| \epsilon - \epsilon_\theta(\sqrt{\bar{\alpha}_t}\, x_0 + "
            r"\sqrt{1 - \bar{\alpha}_t}\, \epsilon, t) \right\|^2",
        ),
        code=(
            code_at("training/tasks/diffusion.py", "DiffusionTask.losses", "x_t = self.objective.add_noise"),
            code_at("models/diffusion/samplers.py", "sample", "x_next = _ancestral("),
        ),
        recipes=("ddpm",),
    ),
    Slide(
        chapter=OBJECTIVE,
        title="Predicted x_0",
        formulas=(
            r"\hat{x}_0 = \frac{x_t}{\sqrt{\bar{\alpha}_t}} - "
            r"\frac{\sqrt{1 - \bar{\alpha}_t}\, \epsilon_\theta(x_t, t)}{\sqrt{\bar{\alpha}_t}}",
        ),
        code=(
            code_at(
                "models/diffusion/discrete.py", "DiscreteObjective.predict_x_0", "return (x_t - sigma * prediction)"
            ),
        ),
        recipes=("ddpm",),
        shows=(PREDICTED, ERRORS),
    ),
    Slide(
        chapter=IMPROVED,
        title="U-Net, ResNet blocks, self-attention, time features",
        text="Time is fed to the residual blocks by addition or by adaptive group normalization. A transformer of "
        "patches does "
        "without the U.",
        formulas=(r"\operatorname{AdaGN}(h, t) = (1 + s_t) \operatorname{GroupNorm}(h) + b_t",),
        code=(
            code_at("models/unet_blocks.py", "TimedResBlock.forward", "h = self.norm_2(h) * (1 + scale) + shift"),
            code_at("models/dit.py", "DiTBlock.forward", "x = x + gate_1[:, None]"),
        ),
        recipes=("dit",),
    ),
    Slide(
        chapter=IMPROVED,
        title="Improving sampling speed: skip some steps",
        text="A strided process has steps of its own, whose variances follow from ᾱ; other solvers need fewer of them.",
        formulas=(
            r"\beta'_i = 1 - \bar{\alpha}_{s_i} / \bar{\alpha}_{s_{i-1}}",
            r"x_{s-1} = \sqrt{\bar{\alpha}_{s-1}}\, \hat{x}_0 + \sqrt{1 - \bar{\alpha}_{s-1} - \sigma^2}\, "
            r"\hat{\epsilon} + \sigma z",
        ),
        code=(
            code_at("models/diffusion/trajectory.py", "spaced_timesteps", "return [round(i * stride)"),
            code_at("models/diffusion/steps.py", "ddim_step", "mean = step.next_signal"),
        ),
        recipes=("fashion_steps",),
    ),
    Slide(
        chapter=IMPROVED,
        title="Improved DDPM",
        text="The variance is learned between its two bounds, by a thousandth of the variational bound beside "
        "L_simple.",
        formulas=(
            r"\Sigma_\theta = \exp\left( v \log\, \beta_t + (1 - v) \log\, \tilde{\beta}_t \right)",
            r"L_{\mathrm{hybrid}} = L_{\mathrm{simple}} + \lambda L_{\mathrm{VLB}}, \qquad \lambda = 0.001",
        ),
        code=(
            code_at("models/diffusion/gaussian.py", "interpolated_log_variance", "return fraction * large"),
            code_at("models/diffusion/discrete.py", "DiscreteObjective.loss", "return simple + total / 1000"),
        ),
        recipes=("fashion_likelihood_hybrid", "fashion_likelihood_loss_aware"),
    ),
    Slide(
        chapter=IMPROVED,
        title="Diffusion models beat GANs",
        text="The gradient of a classifier of noisy images pulls samples towards their class, at the price of variety.",
        formulas=(
            r"\mu' = \mu + s\, \Sigma\, \nabla_{x_t} \log\, p(y|x_t)",
            r"\hat{\epsilon} = \epsilon_\theta(x_t) - \sqrt{1 - \bar{\alpha}_t}\, s\, \nabla_{x_t} \log\, p(y|x_t)",
        ),
        code=(
            code_at("models/diffusion/guidance.py", "classifier_score", "(gradient,) = torch.autograd.grad"),
            code_at("models/diffusion/samplers.py", "_ancestral", "mean = mean + log_variance.exp() * gradient"),
        ),
        recipes=("classifier_guided", "fashion_guidance"),
    ),
    Slide(
        chapter=CONDITIONAL,
        title="Class label, text, another image, depth map",
        text="The condition is one more input of the network. Where it was left out at times in training, the "
        "difference that "
        "it makes can be exaggerated.",
        formulas=(
            r"\epsilon_\theta(x_t, t, y)",
            r"\hat{\epsilon} = \epsilon_\theta(x_t, t, \varnothing) + s \left( \epsilon_\theta(x_t, t, y) - "
            r"\epsilon_\theta(x_t, t, \varnothing) \right)",
        ),
        code=(
            code_at("models/diffusion/guidance.py", "_extrapolated", "return conditional[0]"),
            code_at("models/cross_attention.py", "CrossAttention.forward", "k, v = rearrange"),
            code_at("models/conditioned.py", "ConditionedNetwork.concatenated", "torch.cat"),
            code_at("models/image_tokens.py", "ImageTokens.forward", "self.norm(rearrange(self.patches"),
        ),
        recipes=("class_guided", "glide", "depth_diffusion", "image_cross_attention"),
    ),
    Slide(
        chapter=CONDITIONAL,
        title="Image super-resolution",
        text="Pairs are made by antialiased downsampling: y is the small image, x the large one.",
        formulas=(r"\epsilon_\theta(x_t, t, y), \qquad y = \operatorname{downsample}(x)",),
        code=(code_at("models/diffusion/corruption.py", "downsample", "F.interpolate"),),
        recipes=("super_resolution",),
    ),
    Slide(
        chapter=CONDITIONAL,
        title="Cascaded diffusion models",
        text="Stages are trained on their own, in parallel; between them images are rounded to 8 bits, and each "
        "upsampler learns "
        "from conditions that noise was added to.",
        formulas=(r"y' = \sqrt{\bar{\alpha}_s}\, y + \sqrt{1 - \bar{\alpha}_s}\, \epsilon, \qquad s \sim U",),
        code=(
            code_at("models/diffusion/corruption.py", "augment_low_res", "return signal * low_res"),
            code_at("models/diffusion/corruption.py", "quantize_8_bit", "return from_levels"),
        ),
        recipes=("cascade_1024", "cascade_256"),
    ),
    Slide(
        chapter=CONDITIONAL,
        title="Image-to-image translation",
        text="One model fills masks, extends, colors, restores and enlarges; the error counts in the mask alone. A "
        "model that was not trained for it fills masks too, where known pixels are put back at each step.",
        formulas=(
            r"x_t \leftarrow m \odot x_t + (1 - m) \odot \left( \sqrt{\bar{\alpha}_t}\, y + "
            r"\sqrt{1 - \bar{\alpha}_t}\, \epsilon \right)",
            r"L = \mathbb{E} \left\| m \odot \left( \epsilon - \epsilon_\theta(x_t, t, y) \right) \right\|^2",
        ),
        code=(
            code_at("models/diffusion/samplers.py", "_put", "torch.where"),
            code_at("models/diffusion/degradation.py", "loss_in_mask", "whole = objective.loss"),
            code_at("models/diffusion/degradation.py", "denoise_in_mask", "return lambda x_t, time"),
        ),
        recipes=("palette", "glide_inpainting"),
    ),
    Slide(
        chapter=BEYOND,
        title="Preconditioning, flows, velocity",
        text="The same network and samplers under other processes, and a schedule whose last step holds no signal. A "
        "flow may train the middle of its paths more often. An average by a power of time gets its length after "
        "training. A weaker version of a model tells what to move away from. What guidance does to the deviation of "
        "the output is taken back in part.",
        formulas=(
            r"D_\theta(x; \sigma) = c_{\mathrm{skip}}\, x + c_{\mathrm{out}} F_\theta(c_{\mathrm{in}}\, x; "
            r"c_{\mathrm{noise}})",
            r"x_t = (1 - t)\, x_0 + t\, \epsilon, \qquad L = \|v_\theta - (\epsilon - x_0)\|^2",
            r"v = \sqrt{\bar{\alpha}_t}\, \epsilon - \sqrt{1 - \bar{\alpha}_t}\, x_0",
            r"t = \operatorname{sigmoid}(u), \quad u \sim \mathcal{N}(0, 1)",
            r"\bar{\theta}_n = (1 - 1/n)^{\gamma + 1}\, \bar{\theta}_{n-1} + (1 - (1 - 1/n)^{\gamma + 1})\, "
            r"\theta_n",
            r"D_w = D_0 + w\, (D_1 - D_0)",
            r"\hat{x}_{\mathrm{cfg}} \leftarrow \left( \phi\, \operatorname{std}(x_{\mathrm{pos}}) / "
            r"\operatorname{std}(x_{\mathrm{cfg}}) + 1 - \phi \right) x_{\mathrm{cfg}}",
        ),
        code=(
            code_at("models/diffusion/edm.py", "EDMObjective.predict_x_0", "return factors.c_skip"),
            code_at("models/diffusion/flow.py", "FlowObjective.loss", "errors = output"),
            code_at("models/diffusion/discrete.py", "target", "return signal * noise"),
            code_at("models/diffusion/flow.py", "FlowObjective.times", "return torch.special.ndtri"),
            code_at("training/power_ema.py", "decay_at", "return (1 - 1 / update)"),
            code_at("models/diffusion/guidance.py", "guide", "reference = objective.apply(weaker"),
            code_at("models/diffusion/guidance.py", "_rescaled", "return guided"),
        ),
        recipes=("edm", "flow", "flow_logit_normal", "zero_terminal_snr", "autoguidance"),
    ),
)
