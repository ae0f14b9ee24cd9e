"""What a replica counts, through Ray's metrics: Prometheus finds it where it finds all of Ray's."""

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250]
IMAGES = [1, 2, 4, 8, 16, 32, 64]


class Measures:
    """The measures of one replica; their names on Prometheus' page start with `ray_`."""

    def __init__(self, model: str) -> None:
        tags = {"model": model}

        def counter(name: str, description: str, *more: str) -> Counter:
            made = Counter(f"cascade_serve_{name}", description, tag_keys=("model", *more))
            made.set_default_tags(tags)
            return made

        self.requests = counter("requests", "Jobs that ended, by the code that HTTP has for it", "code")
        self.images = counter("images", "Images that were made", "generator")
        self.steps = counter("steps", "Steps, denoising steps or tokens, times images", "generator")
        self.seconds = Histogram("cascade_serve_request_seconds", "From arrival to end", SECONDS, ("model", "code"))
        self.batch = Histogram("cascade_serve_batch_images", "Images of a batch", IMAGES, ("model", "generator"))
        self.waiting = Gauge("cascade_serve_waiting_images", "Images that no batch has yet", ("model",))
        for metric in (self.seconds, self.batch, self.waiting):
            metric.set_default_tags(tags)

    def ended(self, code: int, seconds: float) -> None:
        """A job, with the code that HTTP has for how it ended; 499: its client went away."""
        self.requests.inc(1, {"code": str(code)})
        self.seconds.observe(seconds, {"code": str(code)})
