"""Tokens of all images of a set, a file for each shard."""

from functools import partial

import torch

from components.configuration.config import Config
from components.data.encoding import describe_autoencoder, encode_shards, token_names
from components.data.shards import BPE, Member, check_member, load_index, read_bpe
from components.data.tokens import parse_tokens
from components.evaluation.codebook import codebook_use
from components.models.bottleneck import codebook_histogram
from components.runtime import events
from components.runtime.storage.artifact import Artifact, read_records
from components.runtime.storage.store import Store
from components.stages.context import StageContext


class TokensConfig(Config):
    """Choice of the image member to encode; the tokenizer decides the tokens."""

    member: Member = "image"  # what of each sample is the image: itself, its depth map or its mask


def tokenize_images(config: TokensConfig, context: StageContext, *, images: Artifact, tokenizer: Artifact) -> Artifact:
    """Encodes the images of both splits; finished files of a killed try are kept.

    Returns a tokens artifact: the files in the order of the index, the caption tokenizer, and as metadata what the
    prior needs to know and how the codebook is used by the whole set.

    Raises, before any work, ValueError for an autoencoder without codes, ShardError for a set without the member.
    """
    network, index, files = describe_autoencoder(tokenizer), load_index(images.url("index.json")), context.files_store
    check_member(index, config.member)
    names, place = token_names(index), {"files": files, "resources": context.resources, "warn": context.warn}
    for done in encode_shards(index, tokenizer, member=config.member, **place):
        context.recorder.emit(events.Progress(context.stage, done, len(names), "shard"))
    files.write(BPE, read_bpe(index).encode())
    with context.pool() as pool:
        summary = pool.call(partial(use_of_codes, files, names, codebook_size=network.codebook_size))
    context.recorder.emit(events.Metrics(context.stage, len(names), summary))
    metadata = {
        "names": names,
        "member": config.member,
        "grid": list(network.grid),
        "codebook_size": network.codebook_size,
        "classes": list(index.classes),
        "text": {"vocab_size": index.text.vocab_size, "text_length": index.text.text_length},
        "summary": summary,
    }
    parts = [entry for record in read_records(files, names) for entry in record.files]
    return context.commit("tokens", parts=parts, written=[BPE], metadata=metadata)


def use_of_codes(files: Store, names: list[str], *, codebook_size: int) -> dict[str, float]:
    """Share of codes in use, perplexity, and counts, over all images of the set. Runs in a worker."""
    histogram, images = torch.zeros(codebook_size, dtype=torch.int64), 0
    for name in names:
        tokens = parse_tokens(files.read(name), name).tokens
        histogram += codebook_histogram(torch.from_numpy(tokens), codebook_size=codebook_size)
        images += len(tokens)
    use = codebook_use(histogram, images)
    return {name: float(value) for name, value in use.items() if name != "codebook_size"}
