"""Tokens of all images of a set, a file for each shard."""

import math
from functools import partial
from typing import Annotated

import numpy as np
import torch

from components.configuration.config import Config, Since
from components.configuration.optimization import Precision
from components.data.encoding import TokenEncoder, describe_autoencoder, shard_jobs, token_names
from components.data.shards import BPE, Member, check_member, load_index, read_bpe
from components.data.tokens import TokenFile, parse_tokens
from components.evaluation.reconstructions import codebook_use
from components.runtime import events
from components.runtime.storage.artifact import Artifact, read_records
from components.runtime.storage.store import Store
from components.stages.context import StageContext

CODES_FROM = 100_000  # images whose codes say how the codebook is used, of files evenly from the set


class TokensConfig(Config):
    """Choice of the image member to encode, and of the precision; the tokenizer decides the tokens."""

    stage_version = 2  # counts and keys of each file, for readers that hold no whole set

    member: Member = "image"  # what of each sample is the image: itself, its depth map or its mask
    precision: Annotated[Precision, Since("fp32")] = "fp32"  # bf16 on GPUs: faster; some codes differ


def tokenize_images(config: TokensConfig, context: StageContext, *, images: Artifact, tokenizer: Artifact) -> Artifact:
    """Encodes the images of both splits; finished files of a killed try are kept.
    Returns a tokens artifact: the files in the order of the index, the caption tokenizer, and as metadata what the
    prior needs to know of each file and of the set, and how CODES_FROM images use the codebook.
    Raises, before any work, ValueError for an autoencoder without codes, ShardError for a set without the member."""
    network, index, files = describe_autoencoder(tokenizer), load_index(images.url("index.json")), context.files_store
    check_member(index, config.member)
    names, how = token_names(index), {"threads": context.resources.reader_threads, "precision": config.precision}
    make_encoder = partial(TokenEncoder, index.header, tokenizer, files, member=config.member, **how)
    with context.pool() as pool:
        for done, _ in enumerate(pool.finish(make_encoder, shard_jobs(index, names), files=files), 1):
            context.recorder.emit(events.Progress(context.stage, done, len(names), "shard"))
        records = read_records(files, names)
        shards = [TokenFile.model_validate(record.facts["tokens"]) for record in records]
        sample = names[:: math.ceil(max(1, sum(shard.samples for shard in shards)) / CODES_FROM)]
        summary = pool.call(partial(use_of_codes, files, sample, codebook_size=network.codebook_size))
    files.write(BPE, read_bpe(index).encode())
    context.recorder.emit(events.Metrics(context.stage, len(names), summary))
    metadata = {
        "shards": [shard.model_dump() for shard in shards],
        "member": config.member,
        "grid": list(network.grid),
        "codebook_size": network.codebook_size,
        "classes": list(index.classes),
        "text": {"vocab_size": index.text.vocab_size, "text_length": index.text.text_length},
        "examples": list(index.text.examples),
        "summary": summary,
    }
    parts = [entry for record in records for entry in record.files]
    return context.commit("tokens", parts=parts, written=[BPE], metadata=metadata)


def use_of_codes(files: Store, names: list[str], *, codebook_size: int) -> dict[str, float]:
    """Share of codes in use, perplexity, and counts, over the images of some files. Runs in a worker."""
    histogram, images = np.zeros(codebook_size, np.int64), 0
    for name in names:
        tokens = parse_tokens(files.read(name), name).tokens
        histogram += np.bincount(tokens.ravel(), minlength=codebook_size)
        images += len(tokens)
    use = codebook_use(torch.from_numpy(histogram), images)
    return {name: float(value) for name, value in use.items() if name != "codebook_size"}
