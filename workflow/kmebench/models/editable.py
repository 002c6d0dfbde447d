"""A causal language model that can be edited, evaluated and put back."""

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from kmebench.data.texts import shown
from kmebench.edits.edit import Edit
from kmebench.edits.ledger import Ledger
from kmebench.edits.overlays import Overlay, Passage, Text
from kmebench.edits.weights import WeightDelta
from kmebench.errors import ModelError
from kmebench.models.encoding import (
    Batch,
    Encoded,
    EncodedSubject,
    Pair,
    SubjectText,
    collate,
    encode,
    encode_pieces,
    encode_prompts,
    encode_subjects,
)
from kmebench.models.hooks import hooked, on_output
from kmebench.models.layouts import FFN, Layout, context_of, ffn_layers, layout_of, windows_of
from kmebench.models.prefixes import Prefix, keys_and_values
from kmebench.precision import promoted

logger = logging.getLogger("kmebench")

#: Accelerate's device maps, which spread a model over several GPUs.
SPREAD = ("balanced", "sequential")


class EditableModel:
    """A Hugging Face causal LM, its tokenizer, its FFN layout and the ledger of its edits.

    All weights are frozen; editors make their own trainable tensors.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        layout = layout_of(model.config)
        self.ffn: list[FFN] = ffn_layers(model, layout)
        self.layers: list[nn.Module] = list(model.get_submodule(layout.layers))
        if layout.prepare:
            layout.prepare(self.layers)
        self.attention = [layer.get_submodule(layout.attention) for layer in self.layers]
        self.windows = windows_of(model.config, self.attention)
        self.norm = model.get_submodule(layout.norm)
        self._parameters = dict(model.named_parameters())
        self._ledger = Ledger(self._parameters)

    @classmethod
    def load(cls, folder: str | Path, *, dtype: str = "float32", device: str = "auto") -> Self:
        """Load a Hugging Face folder of safetensors.

        ``dtype`` names a torch dtype; ``device`` is ``auto`` (cuda, else mps, else cpu), a torch
        device, or ``balanced`` / ``sequential`` for Accelerate's device map over several GPUs.

        Raises:
            ModelError: the folder holds no usable model, or there is no such device.
        """
        if not Path(folder, "config.json").is_file():  # transformers would look on the hub
            raise ModelError(f"{folder} holds no Hugging Face model: it has no config.json.")
        refuse_adapter(folder)
        transformers_logging.disable_progress_bar()
        place = None if device in SPREAD else pick_device(device)
        try:
            # Where nothing is said, transformers asks on a terminal whether to run a folder's code.
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            layout = layout_of(config)  # fail before gigabytes are read
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                output_loading_info=True,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                device_map=None if place else device,
            )
        except (ModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers and tokenizers raise all kinds
            raise ModelError(_why_not(folder, error)) from error
        _check_fit(folder, layout, **found)
        if place:
            model = model.to(place)
        logger.info("loaded %s: %s on %s", folder, dtype, model.device)
        return cls(model, tokenizer)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def n_layers(self) -> int:
        """Number of layers L."""
        return len(self.ffn)

    @property
    def ffn_width(self) -> int:
        """FFN width M."""
        return self.ffn[0].key.width

    def parameter(self, name: str) -> nn.Parameter:
        """The live parameter of that name."""
        return self._parameters[name]

    # -- edits ------------------------------------------------------------------------

    def apply(self, edit: Edit | WeightDelta) -> None:
        """Add an edit to the weights; its overlays act from now on.

        Raises:
            ModelError: it is of another model; nothing is changed then.
        """
        edit = Edit.of(edit)
        self._check(edit)
        self._ledger.apply(edit)

    def _check(self, edit: Edit) -> None:
        """Refuse an edit of a parameter that is not there, or has another shape."""
        for name, part in edit.weights.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                raise ModelError(f"The edit changes {name!r}, which this model lacks.")
            if not part.fits(parameter.shape):
                raise ModelError(
                    f"The edit changes {name!r}, which has another shape in this model "
                    f"({tuple(parameter.shape)}); name the model that it was made from."
                )
        for overlay in edit.overlays.values():
            overlay.check(self)

    def revert(self) -> None:
        """Undo all edits, bit by bit."""
        self._ledger.revert()

    @property
    def edits(self) -> Ledger:
        """The ledger of all edits since loading or :meth:`revert`."""
        return self._ledger

    # -- text in, logits out ----------------------------------------------------------

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """Encode prompts with their targets.

        Raises:
            ModelError: a pair is longer than the context of the model, or has no token, or one
                that the model lacks.
        """
        encoded = encode(self.tokenizer, pairs)
        for (prompt, _), item in zip(pairs, encoded, strict=True):
            self._check_tokens(item.ids)
            self._check_length(prompt, len(item.ids), " with its target")
        return encoded

    def encode_prompts(self, prompts: Sequence[str], room: int = 0) -> list[tuple[int, ...]]:
        """Encode prompts that the model goes on from, by ``room`` tokens at most.

        Raises:
            ModelError: a prompt is longer than the context of the model, or has no token, or one
                that the model lacks.
        """
        encoded = encode_prompts(self.tokenizer, prompts)
        for prompt, ids in zip(prompts, encoded, strict=True):
            self._check_tokens(ids)
            what = f" with the {room} that may follow" if room else ""
            self._check_length(prompt, len(ids) + room, what)
        return encoded

    def encode_subjects(self, texts: Sequence[SubjectText]) -> list[EncodedSubject]:
        """Encode filled prompts and find the last token of their subjects.

        Raises:
            ModelError: a text is longer than the context of the model, or has no such token, or a
                token that the model lacks.
        """
        encoded = encode_subjects(self.tokenizer, texts)
        for text, item in zip(texts, encoded, strict=True):
            self._check_tokens(item.ids)
            self._check_length(text.prefix + text.prompt, len(item.ids), " with its target")
        return encoded

    def encode_pieces(self, text: str, length: int) -> list[list[int]]:
        """Encode a text in pieces of at most ``length`` tokens that each begin as texts do.

        Raises:
            ModelError: it has a token that the model lacks.
        """
        pieces = encode_pieces(self.tokenizer, text, length)
        for ids in pieces:
            self._check_tokens(ids)
        return pieces

    @property
    def context(self) -> int | None:
        """How many tokens the model can read; None if its positions have no end."""
        return context_of(self.model.config)

    @property
    def limit(self) -> str:
        """What a text that is too long has more tokens than, in words."""
        whole = getattr(self.model.config, "max_position_embeddings", None)
        why = ", beyond which LongRoPE moves all positions" if whole != self.context else ""
        return f"the {self.context} of the model's context{why}"

    def _check_length(self, prompt: str, tokens: int, what: str) -> None:
        if self.context is not None and tokens > self.context:
            raise ModelError(
                f"The prompt {shown(prompt)}{what} has {tokens} tokens, more than {self.limit}."
            )

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has an embedding of; a tokenizer may know more."""
        return self.model.get_input_embeddings().weight.shape[0]

    def _check_tokens(self, ids: Sequence[int]) -> None:
        if max(ids) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ModelError(
                f"The tokenizer has a token {token!r} (number {max(ids)}), and the model only "
                f"{self.vocabulary} embeddings: they do not belong together; put the tokenizer "
                "that the model was trained with into its folder, or resize its embeddings."
            )

    @property
    def pad_id(self) -> int:
        """A token id for padding (never attended to)."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(c for c in candidates if c is not None and c < self.vocabulary)

    @property
    def end_ids(self) -> set[int]:
        """The tokens that end an answer: the tokenizer's, and those of generation_config.json.

        Chat models name the end of a turn and the end of a text; the tokenizer knows one of them.
        """
        own = self.model.generation_config.eos_token_id if self.model.can_generate() else None
        named = own if isinstance(own, list) else [own]
        return {i for i in (self.tokenizer.eos_token_id, *named) if i is not None}

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """Pad encoded pairs into one batch on the model's device."""
        return collate(encoded, self.pad_id, self.device)

    def rewritten(self, texts: Sequence[Text]) -> Sequence[Text]:
        """Return what is asked instead of ``texts``: the first place where overlays act."""
        for overlay in self.edits.overlays.values():
            texts = overlay.rewrite(texts)
        return texts

    @property
    def gated(self) -> bool:
        """Whether an overlay acts on some questions alone."""
        return any(overlay.gated for overlay in self.edits.overlays.values())

    @property
    def shares_prefixes(self) -> bool:
        """Whether what texts begin with may be read apart: no overlay acts inside the model."""
        return all(type(each).hooks is Overlay.hooks for each in self.edits.overlays.values())

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Prefix:
        """Read what several texts begin with, once for all of them."""
        cache = DynamicCache()  # no configuration: a layer with a window would drop positions
        batch = torch.tensor([ids], device=self.device)
        self.model.base_model(input_ids=batch, past_key_values=cache, use_cache=True)
        return Prefix(tuple(ids), keys_and_values(cache))

    def answer_logits(
        self, batch: Batch, prefix: Prefix | None = None, passage: Passage | None = None
    ) -> Tensor:
        """Return the logits at the answer positions, [A, vocabulary], in float32 or float64.

        The texts of the batch stand behind ``prefix``, which they do not hold. The head is applied
        at the answer positions only: on a small model it is a fifth of all work. Overlays leave in
        ``passage`` what they decide.
        """
        passage = passage or Passage(batch.prompt_last, batch.rows)
        with self.passage(passage):
            answers = self.final_states(batch, prefix)
        return self._overlaid(passage, self.head(answers))

    def final_states(self, batch: Batch, prefix: Prefix | None = None) -> Tensor:
        """Return the normed final states at the answer positions, [A, D].

        Hooks of overlays act on them only within a :meth:`passage`.
        """
        cached = {"past_key_values": prefix.cache()} if prefix else {}
        passed = self.model.base_model(
            input_ids=batch.input_ids, use_cache=prefix is not None, **cached
        )
        hidden = passed.last_hidden_state
        return hidden[batch.rows.to(hidden.device), batch.positions.to(hidden.device)]

    @contextmanager
    def passage(self, passage: Passage) -> Iterator[None]:
        """Let overlays act on module outputs while texts pass through the model.

        Without overlays nothing is registered. The module tree stays as it is.
        """
        handles = (
            self.model.get_submodule(path).register_forward_hook(on_output(hook))
            for overlay in self.edits.overlays.values()
            for path, hook in overlay.hooks(passage).items()
        )
        with hooked(handles):
            yield

    def _overlaid(self, passage: Passage, logits: Tensor) -> Tensor:
        """Return the logits as overlays want them: the last place where they act."""
        for overlay in self.edits.overlays.values():
            logits = overlay.logits(passage, logits, self)
        return logits

    @torch.no_grad()
    def next_token_logits(self, prompt: str) -> Tensor:
        """Return the logits of the token after a prompt, [vocabulary], float32 or float64."""
        (asked,) = self.rewritten([Text(prompt)])
        (ids,) = self.encode_prompts([asked.prompt])
        # The padding stands for the token to predict; causal attention keeps it from being read.
        return self.answer_logits(self.collate([Encoded((*ids, self.pad_id), n_target=1)]))[0]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n_tokens: int,
        stopping: StoppingCriteriaList | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Go on greedily from prompts, R rows of token ids; return the new tokens, [R, ≤ n].

        Prompts are padded on the left, behind a ``prefix`` that all of them begin with. Where
        attention has a window, prompts behind a prefix must be of one length: padding between
        would take its places. Rows that end early are filled with padding.
        """
        longest, shared = max(len(ids) for ids in prompts), len(prefix.ids) if prefix else 0
        input_ids = torch.full((len(prompts), longest), self.pad_id)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            own = longest - len(ids) + shared  # column of the first token behind the prefix
            for columns, part in ((slice(shared), ids[:shared]), (slice(own, None), ids[shared:])):
                input_ids[row, columns] = torch.tensor(part, dtype=torch.long)
                mask[row, columns] = 1
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=n_tokens,
            eos_token_id=sorted(self.end_ids) or None,
            pad_token_id=self.pad_id,
        )
        last = torch.full((len(prompts),), longest - 1, device=self.device)
        first = torch.tensor([longest - len(ids) for ids in prompts], device=self.device)
        passage = Passage(last, phase="prefill", prompt_first=first)
        head = self.model.get_output_embeddings().register_forward_pre_hook(_together)
        with head, _plain_greedy(self.model), self._decoding(passage) as processors:
            output = self.model.generate(
                input_ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=config,
                stopping_criteria=stopping,
                logits_processor=processors,
                **({"past_key_values": prefix.cache()} if prefix else {}),
            )
        return output[:, longest:].cpu()

    @contextmanager
    def _decoding(self, passage: Passage) -> Iterator[LogitsProcessorList | None]:
        """Let overlays act on a generation; yield what changes its logits."""
        if not self.edits.overlays:
            yield None
            return

        def begins(*_: Any) -> None:
            passage.phase, passage.started = ("decode" if passage.started else "prefill"), True

        def overlaid(_ids: Tensor, scores: Tensor) -> Tensor:
            return self._overlaid(passage, scores)

        first = self.model.get_input_embeddings()  # not every head runs the base model as a module
        with first.register_forward_pre_hook(begins), self.passage(passage):
            yield LogitsProcessorList([overlaid])

    def head(self, states: Tensor) -> Tensor:
        """Return the logits of normed final states, [..., vocabulary], in float32 or float64."""
        logits = self.capped(self.model.get_output_embeddings()(states))
        return logits.to(promoted(logits.dtype))

    def capped(self, logits: Tensor) -> Tensor:
        """Return logits within the bound that some families (Gemma 2) put on them."""
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _together(_head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give a head the states of all rows as one matrix.

    What `generate` hands it is a view with gaps, the last token of each row, for which torch
    multiplies every row by a copy of the head: on a CPU that takes longer than all layers.
    """
    return (inputs[0].contiguous(), *inputs[1:])


@contextmanager
def _plain_greedy(model: PreTrainedModel) -> Iterator[None]:
    """Leave out what a model's ``generation_config.json`` adds, as penalties and barred tokens.

    ``generate`` takes from there whatever it was not given; then the next token would not be the
    most probable one.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def refuse_adapter(folder: str | Path) -> None:
    """Refuse a folder with an adapter, which transformers puts into the model unasked.

    Saving the model would then save the adapter alone, without any edit.

    Raises:
        ModelError: there is one.
    """
    if Path(folder, "adapter_config.json").exists():
        raise ModelError(f"{folder} holds a PEFT adapter: merge it, and save the merged model.")


def pick_device(device: str) -> torch.device:
    """Resolve ``auto`` to cuda, else mps, else cpu; anything else names a torch device.

    Raises:
        ModelError: this machine has no such device.
    """
    mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    kind, _, index = device.partition(":")
    there = {"cpu": True, "mps": mps, "cuda": int(index or 0) < torch.cuda.device_count()}
    if not there.get(kind):
        raise ModelError(
            f"The device {device!r} is not there (CUDA devices that torch sees: "
            f"{torch.cuda.device_count()}); choose auto or cpu, or install a torch for your GPU."
        )
    return torch.device(device)


def seed_everything(seed: int) -> None:
    """Seed torch and ask for deterministic kernels: same machine, same seed, same bytes.

    Before the first product on a GPU: cuBLAS reads its environment once, and torch before 2.10
    refuses to multiply deterministically without the variable.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before writing it; to fill all of it first costs a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False


def describe(model: EditableModel) -> dict[str, Any]:
    """Facts about a loaded model for the record of a run."""
    return {
        "model_type": model.model.config.model_type,
        "layers": model.n_layers,
        "ffn_width": model.ffn_width,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def _why_not(folder: str | Path, error: Exception) -> str:
    """Say why a folder could not be loaded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in reason:
        return (
            f"The model in {folder} needs code of its own, which is never run; choose a model "
            "that transformers itself can load."
        )
    return (
        f"No model could be loaded from {folder} ({reason}); if the workflow made that folder, "
        "delete it and run the same command again."
    )


def _check_fit(
    folder: str | Path,
    layout: Layout,
    missing_keys: Collection[str],
    unexpected_keys: Collection[str],
    **_: Any,
) -> None:
    """Refuse weights that are not the layers of config.json, where transformers only warns."""
    if lacking := sorted(missing_keys):  # transformers would make them up
        raise ModelError(
            f"The weights in {folder} lack {len(lacking)} tensors of the model that its "
            f"config.json describes, such as {lacking[0]}; copy or save the model again."
        )
    value = f".{layout.value_projection}.weight"  # heads and buffers may go unused, layers not
    if further := sorted(key for key in unexpected_keys if key.endswith(value)):
        raise ModelError(
            f"The weights in {folder} hold more layers than its config.json describes "
            f"({len(further)} more, such as that of {further[0]}); copy or save the model again."
        )
