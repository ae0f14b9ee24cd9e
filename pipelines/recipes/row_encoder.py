"""The contrastive encoder that three rows share: it ranks what DALL-E made, and reads for Imagen and DALL-E 2."""

from components.configuration.trainings import ContrastiveTraining


def contrastive() -> ContrastiveTraining:
    """Captions and images of 16² in one space."""
    return ContrastiveTraining.of(
        resolution=16,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        patch_size=1,
        embedding_dim=64,
        text_dim=64,
        text_layers=2,
        text_heads=4,
        max_shift=1,
        total_steps=300,
        global_batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.05,
        ema_decay=0.99,
        checkpoint_every=150,
        sample_every=300,
    )
