"""Bad MODELs: configuration, tensors and tokenizer."""

from __future__ import annotations

import json

import torch

from lopt_lite.checkpoints.nf4 import quantize_matrix
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.data import template_limits
from tests.bad_inputs.place import (
    INPUT,
    bad,
)

# -- MODEL: config.json and the architecture ---------------------------------------------------------------------------


@bad(INPUT, "no config.json beside", "--config DIR")
def model_without_config(place):
    (place.own_model() / "config.json").unlink()
    return place.train()


@bad(INPUT, "config.json is not valid JSON", "to fix")
def config_that_is_not_json(place):
    (place.own_model() / "config.json").write_text('{"model_type": "llama",')
    return place.train()


@bad(INPUT, "not a model's configuration", "model_type", "--config DIR")
def config_without_a_model_type(place):
    (place.own_model() / "config.json").write_text('{"hidden_size": 32}')
    return place.train()


@bad(INPUT, "generation_config.json", "not valid JSON", "take it away")
def generation_config_that_is_not_json(place):
    (place.own_model() / "generation_config.json").write_text("{bad")
    return place.train()


@bad(INPUT, "generation_config.json has the eos_token_id '</s>'", "number of a token", "take it away")
def generation_config_whose_end_is_a_text(place):
    (place.own_model() / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    return place.train()


@bad(INPUT, "hypermamba", "config.json", "transformers release")
def unknown_architecture(place):
    place.change_config(model_type="hypermamba", architectures=["HyperMamba"])
    return place.train()


@bad(INPUT, "remote code", "hypermamba", "never run")
def architecture_that_needs_remote_code(place):
    place.change_config(model_type="hypermamba", auto_map={"AutoConfig": "evil.Config"})
    (place.model / "evil.py").write_text("raise SystemExit('this code must never run')")
    return place.train()


@bad(INPUT, "t5", "decoder-only")
def encoder_decoder(place):
    place.change_config(model_type="t5", architectures=["T5ForConditionalGeneration"], num_heads=4, d_kv=8, d_ff=64)
    return place.train()


@bad(INPUT, "BertLMHeadModel", "encoder", "decoder-only")
def encoder_alone(place):
    place.change_config(model_type="bert", architectures=["BertForMaskedLM"])
    return place.train()


@bad(INPUT, "config.json", "to fix: check config.json")
def config_with_a_value_of_the_wrong_type(place):
    place.change_config(hidden_size="wide")
    return place.train()


@bad(INPUT, "layers", "config.json")
def config_with_no_layers(place):
    place.change_config(num_hidden_layers=0)
    return place.train()


@bad(INPUT, "num_hidden_layers 1000000000", "1000 layers at most", "config.json")
def config_with_a_billion_layers(place):
    place.change_config(num_hidden_layers=10**9)
    return place.train()


@bad(INPUT, "num_hidden_layers 900", "no more layers than the weights have tensors", "belongs to these weights")
def config_with_more_layers_than_tensors(place):
    place.change_config(num_hidden_layers=900)
    return place.train()


@bad(INPUT, "MambaForCausalLM has no attention heads", "hybrid", "choose a model with attention layers")
def model_without_attention(place):
    config = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 4}
    (place.own_model() / "config.json").write_text(json.dumps(config))
    return place.train()


@bad(INPUT, "Gemma4ForCausalLM gives its layers more of the embedded tokens", "no embeddings", "choose another model")
def model_whose_layers_are_given_embeddings(place):
    place.change_config(model_type="gemma4_text", hidden_size_per_layer_input=8, head_dim=8, rope_parameters=None)
    return place.train()


@bad(INPUT, "already quantised (gptq)", "bring the unquantised checkpoint")
def gptq_checkpoint(place):
    place.change_config(quantization_config={"quant_method": "gptq", "bits": 4})
    return place.train()


@bad(INPUT, "already quantised (bitsandbytes int8)", "NF4", "bring the unquantised checkpoint")
def int8_checkpoint(place):
    place.change_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    return place.train()


# -- MODEL: the tensors ------------------------------------------------------------------------------------------------


@bad(INPUT, "lacks model.layers.1.mlp.down_proj.weight", "config.json belongs to these weights")
def checkpoint_that_lacks_a_tensor(place):
    place.change_weights(lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    return place.train()


@bad(INPUT, "model.norm.weight has shape [31]", "[32], from config.json", "config.json belongs to these weights")
def tensor_of_another_shape_than_config_says(place):
    place.change_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    return place.train()


@bad(INPUT, "has shape [32, 64]", "[32, 96]", "config.json belongs to these weights")
def config_of_another_size_than_the_tensors(place):
    place.change_config(intermediate_size=96)
    return place.train()


@bad(INPUT, "model.norm.weight", "I8", "BF16, F16 or F32", "unquantised checkpoint")
def weights_of_an_integer_type(place):
    place.change_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    return place.train()


@bad(INPUT, "lm_head.weight", "F64", "BF16, F16 or F32")
def weights_in_double_precision(place):
    place.change_weights(lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].double()}))
    return place.train()


@bad(INPUT, "lm_head.weight with other numbers than model.embed_tokens.weight", '"tie_word_embeddings": false')
def tied_head_that_differs_from_the_embedding(place):
    place.change_config(tie_word_embeddings=True)
    return place.train()


@bad(INPUT, "model.layers.1.self_attn.q_proj.weight", "NaN", "download the checkpoint again", found_at_work=True)
def weights_that_are_not_numbers(place):
    place.change_weights(lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"][3].fill_(float("nan")))
    return place.train()


@bad(INPUT, "model.norm.weight", "infinity", "sound one", found_at_work=True)
def infinite_weights_in_quantize(place):
    place.change_weights(lambda tensors: tensors["model.norm.weight"][3].fill_(float("inf")))
    return ["quantize", str(place.model), str(place.root / "store"), "--device", "cpu"]


PACKED = "model.layers.1.mlp.up_proj.weight"


def pack_and(change):
    """Put a matrix into 4 bits, as bitsandbytes does, and then change its tensors."""

    def pack(tensors):
        weight = tensors.pop(PACKED)
        tensors.update(quantize_matrix(PACKED, weight, dtype=torch.bfloat16, device=torch.device("cpu")))
        change(tensors)

    return pack


@bad(INPUT, f"lacks {PACKED}.absmax", "as its state says", "unquantised one")
def four_bit_matrix_without_its_scales(place):
    place.change_weights(pack_and(lambda tensors: tensors.pop(PACKED + ".absmax")))
    return place.train()


@bad(INPUT, f"{PACKED} of a 4-bit matrix is U8 of shape [100, 1]", "as its state says", "unquantised one")
def four_bit_matrix_that_is_cut_short(place):
    place.change_weights(pack_and(lambda tensors: tensors.update({PACKED: tensors[PACKED][:100].clone()})))
    return place.train("--quantize", "nf4")


@bad(INPUT, "has blocksize 0", "one of 32, 64", "unquantised one")
def four_bit_matrix_in_blocks_of_nothing(place):
    def say_nothing(tensors):
        state = json.loads(bytes(tensors[PACKED + STATE_SUFFIX].tolist()))
        text = json.dumps({**state, "blocksize": 0}).encode()
        tensors[PACKED + STATE_SUFFIX] = torch.tensor(list(text), dtype=torch.uint8)

    place.change_weights(pack_and(say_nothing))
    return ["quantize", str(place.model), str(place.root / "store"), "--device", "cpu"]


@bad(INPUT, f"{PACKED}{STATE_SUFFIX} is not valid JSON", "what bitsandbytes writes", "unquantised one")
def four_bit_matrix_with_a_state_of_zeros(place):
    zeros = torch.zeros(90, dtype=torch.uint8)
    place.change_weights(pack_and(lambda tensors: tensors.update({PACKED + STATE_SUFFIX: zeros})))
    return place.train()


@bad(INPUT, f"{PACKED}.nested_absmax", "NaN", "download the checkpoint again", found_at_work=True)
def four_bit_matrix_whose_scales_are_not_numbers(place):
    place.change_weights(pack_and(lambda tensors: tensors[PACKED + ".nested_absmax"].fill_(float("nan"))))
    return place.train("--quantize", "nf4")


# -- MODEL: the tokenizer ----------------------------------------------------------------------------------------------


@bad(INPUT, "no tokenizer beside the model", "tokenizer.json", "--config DIR")
def model_without_tokenizer(place):
    (place.own_model() / "tokenizer.json").unlink()
    return place.train()


@bad(INPUT, "the tokenizer in", "cannot be loaded", "get them again")
def broken_tokenizer(place):
    (place.own_model() / "tokenizer.json").write_text('{"version": "1.0"}')
    return place.train()


@bad(INPUT, "embedding has 100 rows", "tokenizer that belongs to this model")
def tokenizer_of_a_larger_vocabulary(place):
    place.change_config(vocab_size=100)
    return place.train()


@bad(INPUT, "the chat template ran for 1 seconds", "chat_template.jinja")
def chat_template_that_never_ends(place):
    place.patch.setattr(template_limits, "MOST_SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (place.own_model() / "chat_template.jinja").write_text(loop)
    return place.train()


@bad(INPUT, "the chat template makes more than 1,000,000 characters")
def chat_template_that_fills_memory(place):
    place.patch.setattr(template_limits, "MOST_CHARACTERS", 1_000_000)
    flood = "{% for i in range(99999) %}{% for j in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endfor %}"
    (place.own_model() / "chat_template.jinja").write_text(flood)
    return place.train()


@bad(INPUT, "__class__", "unsafe")
def chat_template_that_reaches_for_attributes(place):
    reach = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (place.own_model() / "chat_template.jinja").write_text(reach)
    return place.train()


@bad(INPUT, "template", "tokenizer")
def broken_chat_template(place):
    (place.own_model() / "chat_template.jinja").write_text("{% for message in messages %}{{ message.")
    return place.train()
