"""tiny-gptj: a GPT-J of about one and a half million parameters that knows OpenFacts.

It is trained here, from nothing, until it answers its facts: the GPT-J code path (parallel
attention and FFN, biases) with a model whose knowledge is real but small.
"""

import logging
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

from kmebench.errors import ModelError
from kmebench.io.logs import track
from kmebench.models.encoding import Batch, Encoded, collate, encode

logger = logging.getLogger("kmebench")

END = "<|endoftext|>"
VOCABULARY = 3000
BATCH = 32
PEAK_RATE = 3e-3
CONTEXT_WEIGHT = 0.1  # of a prompt token's loss, against 1 for a token of the answer
KNOWN = 0.95


def train_tiny(
    facts: Sequence[tuple[str, str]], seed: int, max_epochs: int = 10
) -> tuple[GPTJForCausalLM, PreTrainedTokenizerFast, float]:
    """Train until 99.5% of ``facts`` (prompt, answer) are answered, or ``max_epochs``.

    Returns the model, its tokenizer and the share of facts it answers exactly.

    Raises:
        ModelError: fewer than 95% are answered in the end.
    """
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([f"{prompt} {answer}." for prompt, answer in facts])
    model = GPTJForCausalLM(_config(tokenizer))
    encoded = encode(tokenizer, [(prompt, f"{answer}.") for prompt, answer in facts])
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.0, fused=True)
    n_batches = -(-len(facts) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, PEAK_RATE, total_steps=max_epochs * n_batches, pct_start=0.1
    )
    share = 0.0
    for epoch in track(range(max_epochs), "epochs of tiny-gptj", max_epochs):
        model.train()
        for chunk in _shuffled_chunks(encoded):
            batch = _collate([encoded[i] for i in chunk])
            optimiser.zero_grad()
            _loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        share = answered(model.eval(), encoded)
        logger.info("epoch %d: %.1f%% of the facts answered", epoch + 1, 100 * share)
        if share >= 0.995:
            break
    if share < KNOWN:
        raise ModelError(
            f"tiny-gptj answers {share:.1%} of its facts after {max_epochs} epochs, less than "
            f"{KNOWN:.0%}; raise its max_epochs in the config."
        )
    return model, tokenizer, share


def _shuffled_chunks(encoded: Sequence[Encoded]) -> list[list[int]]:
    """Deal all examples into batches of similar length, both in a new random order."""
    order = torch.randperm(len(encoded)).tolist()
    order.sort(key=lambda index: len(encoded[index].ids))
    starts = BATCH * torch.randperm(-(-len(order) // BATCH))
    return [order[start : start + BATCH] for start in starts.tolist()]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on ``texts``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, unk_token=END
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> GPTJConfig:
    return GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=128,
        n_layer=4,
        n_head=4,
        rotary_dim=32,
        n_inner=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )


def _collate(encoded: Sequence[Encoded]) -> Batch:
    return collate(encoded, 0, torch.device("cpu"))


def _loss(model: GPTJForCausalLM, batch: Batch) -> Tensor:
    """Cross-entropy of the answers plus a little of the prompts (padding excluded)."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.float()
    answers = torch.nn.functional.cross_entropy(logits[batch.rows, batch.positions], batch.labels)
    inside = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    first = batch.positions.new_full((len(batch.counts),), batch.input_ids.shape[1])
    first = first.scatter_reduce(0, batch.rows, batch.positions, "amin")
    inside[:, :-1] = torch.arange(batch.input_ids.shape[1] - 1) < first[:, None]
    context = torch.nn.functional.cross_entropy(
        logits[inside], batch.input_ids.roll(-1, dims=1)[inside]
    )
    return answers + CONTEXT_WEIGHT * context


@torch.no_grad()
def answered(model: GPTJForCausalLM, encoded: Sequence[Encoded]) -> float:
    """Return the share of pairs whose target is the argmax at every position."""
    right = 0
    for start in range(0, len(encoded), 256):
        batch = _collate(encoded[start : start + 256])
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        hit = logits[batch.rows, batch.positions].argmax(dim=-1) == batch.labels
        right += sum(bool(part.all()) for part in hit.split(batch.counts.tolist()))
    return right / len(encoded)
