"""check of language models of Hugging Face, which compute norms, logits and rotary angles in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlo

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, intermediate_size=32, num_key_value_heads=1, max_position_embeddings=16)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, intermediate_size=32, max_position_embeddings=16)
    )


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, options)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-0.3, 0.4, 8))

    def forward(self, index: Tensor) -> Tensor:
        return self.logits[index].sigmoid()


class Fit(mlo.Problem):
    def loss(self, batch, w):
        logits = self(input_ids=batch["input_ids"]).logits[:, :-1].float()
        errors = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        return (w(batch["index"]) * errors.mean(1)).mean()


class Judge(mlo.Problem):
    def loss(self, batch, model):
        return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def engine(model: nn.Module, estimator: object) -> mlo.Engine:
    """Training with weighted samples, on batches as a tokenizer makes them, after one round."""
    trained, w = [p for p in model.parameters() if p.requires_grad], Weights()
    ids = torch.randint(0, 50, (8, 6))
    data = [
        transformers.BatchEncoding({"input_ids": ids[part], "index": torch.arange(8)[part], "labels": None})
        for part in (slice(4), slice(4, 8))
    ]
    made = mlo.Engine(
        [
            Fit("model", module=model, optimizer=torch.optim.AdamW(trained, lr=1e-2), data=data, steps=2),
            Judge("w", module=w, optimizer=torch.optim.SGD(w.parameters(), lr=0.1), data=data),
        ],
        estimator,
        device="cpu",
    )
    made.run(1)
    return made


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["all", "lora"])
@pytest.mark.parametrize(
    "model", [gpt2, pytest.param(llama, marks=pytest.mark.slow), pytest.param(bert, marks=pytest.mark.slow)]
)
def test_the_hypergradient_through_a_language_model_is_confirmed_and_one_percent_too_much_is_seen(
    model, lora, monkeypatch
):
    torch.manual_seed(0)
    made = engine(with_lora(model()) if lora else model(), "unrolled")
    mlo.check(made)
    real = made.hypergradient
    monkeypatch.setattr(made, "hypergradient", lambda *args: {n: 1.01 * v for n, v in real(*args).items()})
    with pytest.raises(mlo.HypergradientError, match=r"off by (1\.0e-02|9\.9e-03)"):
        mlo.check(made)
