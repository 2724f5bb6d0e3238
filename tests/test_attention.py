"""Faster ways through a training step on a CPU: each gives what the plain way gives."""

import pytest
import torch
from tiny import document_row, image_processor, processor, unit_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from modeling_unit.attention_unit import SHORT, short_attention, suits_short_attention
from training.aligned_attention import return_first_head
from training.collator import GroupCollator
from training.losses import alignment_loss
from training.norms import quicken_norms
from training.plan_step import scratch_arguments
from training.trainer import UnitTrainer


def tensors(*shape, count=3, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_short_attention_is_attention_forward_and_backward(causal):
    inputs = tensors(2, 3, 5, 4)
    weights = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = scaled_dot_product_attention(*inputs, is_causal=causal, scale=0.3)
    attended, first = short_attention(*inputs, 0.3, causal)
    assert first is None
    torch.testing.assert_close(attended.transpose(1, 2), expected)
    own = gradients((attended.transpose(1, 2) * weights).sum(), inputs)
    for mine, theirs in zip(own, gradients((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_of_the_first_heads_weights_reach_queries_and_keys():
    inputs = tensors(1, 2, 4, 3)
    query, key, _ = inputs
    scores = (query @ key.transpose(-1, -2)).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    expected = scores.softmax(dim=-1)[:, :1]
    _, first = short_attention(*inputs, 1.0, causal=True, first_head=True)
    torch.testing.assert_close(first.double(), expected, atol=1e-6, rtol=1e-6)  # float32
    own = gradients(first[..., 0].square().sum(), inputs[:2])
    for mine, theirs in zip(own, gradients(expected[..., 0].square().sum(), inputs[:2]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_long_sequences_dropout_and_float32_stay_with_torchs_kernel():
    narrow = torch.zeros(1, 1, SHORT, 8, dtype=torch.bfloat16)
    assert suits_short_attention(narrow, 0.0)
    assert not suits_short_attention(narrow, 0.1)
    assert not suits_short_attention(narrow.float(), 0.0)
    assert not suits_short_attention(torch.zeros(1, 1, SHORT + 1, 8, dtype=torch.bfloat16), 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert suits_short_attention(narrow.float(), 0.0)


def decoder():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    return Qwen3ForCausalLM._from_config(config, attn_implementation="eager").train()


@pytest.mark.parametrize("padded", [False, True])
def test_the_alignment_loss_of_the_first_head_alone_is_that_of_all_heads(padded):
    model = decoder()
    ids = torch.arange(14).reshape(2, 7) % 11
    places = torch.tensor([[-1, -1, 0, 1, 0, 1, -1], [-1, -1, 1, 0, 1, 0, -1]])
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    given = {"input_ids": ids, "labels": ids, "output_attentions": True, "use_cache": False}
    given |= {"attention_mask": mask} if padded else {}
    found = []
    for own in (False, True):
        if own:
            return_first_head(model)
        model.zero_grad()
        output = model(**given)
        loss = output.loss + alignment_loss(output.attentions, places)[0].mean
        loss.backward()
        found.append((loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}))
    assert output.attentions[0].shape == (2, 1, 7, 7)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_quickened_norms_have_the_formulas_values_and_gradients():
    torch.manual_seed(0)
    norm = Qwen3RMSNorm(6, eps=1e-3).train()
    norm.weight.data.normal_()
    hidden, slope = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 6)
    expected = norm(hidden)
    wanted = gradients((expected * slope).sum(), [hidden, norm.weight])
    assert quicken_norms(norm) == 1
    output = norm(hidden)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients((output * slope).sum(), [hidden, norm.weight]), wanted)
    # what is normed for the products of autocast comes as they would narrow it; narrow heads come wide, as they did
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(hidden).dtype == torch.bfloat16
        assert norm(hidden.bfloat16()).dtype == torch.float32
    norm.eval()
    assert torch.equal(norm(hidden), Qwen3RMSNorm.forward(norm, hidden))


def test_norms_of_another_formula_are_left_alone():
    assert quicken_norms(GemmaRMSNorm(6)) == 0


def test_logits_of_the_text_alone_give_the_loss_of_all(tmp_path):
    model = unit_model()
    arguments = scratch_arguments({"max_steps": 1, "output_dir": str(tmp_path)})
    trainer = UnitTrainer(model=model, args=arguments, image_processor=image_processor(), train_dataset=[0])
    collator = GroupCollator(processor(), "document", 4)
    batch = collator([document_row(text="one two"), document_row(text="three")], None)
    model.eval()
    losses = []
    for behind in (False, True):
        trainer.text_behind = behind
        loss, outputs = trainer.compute_loss(model, {"document_x4": dict(batch)}, return_outputs=True)
        losses.append(loss.detach())
    assert outputs["document_x4"].logits.shape[1] < batch["labels"].shape[1]
    torch.testing.assert_close(losses[1], losses[0])
