"""Bad DATA and bad options."""

from __future__ import annotations

import gzip
import json

import torch

from tests.bad_inputs.place import (
    GOOD_LINE,
    INPUT,
    SETTINGS,
    bad,
)

# -- DATA --------------------------------------------------------------------------------------------------------------


@bad(INPUT, "no-such.jsonl does not exist", "check the path")
def data_that_is_not_there(place):
    place.data = place.root / "no-such.jsonl"
    return place.train()


@bad(INPUT, "is a directory", "JSON Lines file")
def directory_as_data(place):
    place.data = place.stray_directory("data")
    return place.train()


@bad(INPUT, "own.jsonl is empty", "one JSON object per line")
def empty_data(place):
    place.own_data(b"")
    return place.train()


@bad(INPUT, "own.jsonl is empty", "one JSON object per line")
def data_of_blank_lines(place):
    place.own_data(b"\n  \r\n\n")
    return place.train()


@bad(INPUT, "own.jsonl, line 7", "not valid JSON", "--skip-bad-lines")
def bad_json_at_line_7(place):
    place.own_data([*[GOOD_LINE] * 6, '{"question": "What is', GOOD_LINE])
    return place.train()


@bad(INPUT, "own.jsonl, line 1", "not UTF-8", "--skip-bad-lines")
def binary_garbage_as_data(place):
    place.own_data(bytes(range(255, 0, -1)) * 20)
    return place.train()


@bad(INPUT, "own.jsonl looks like a gzip file", "JSON Lines", "gzip -dc")
def gzip_file_as_data(place):
    place.own_data(gzip.compress(place.stock.data.read_bytes()))
    return place.train("--skip-bad-lines")


@bad(INPUT, "own.jsonl looks like a Parquet file", "JSON Lines", "read_parquet(FILE).to_json(")
def parquet_file_as_data(place):
    place.own_data(b"PAR1\x15\x04\x15\x10" + bytes(100) + b"PAR1")
    return place.train()


@bad(INPUT, "line 1", "UTF-16", "save the file as UTF-8")
def data_in_utf_16(place):
    place.own_data(json.dumps(GOOD_LINE).encode("utf-16"))
    return place.train()


@bad(INPUT, "line 1", "one object per line, not one array")
def one_json_array_as_data(place):
    place.own_data(json.dumps([GOOD_LINE], indent=2).encode())
    return place.train()


@bad(INPUT, "line 2", "a JSON string, not an object")
def line_that_is_no_object(place):
    place.own_data([GOOD_LINE, '"just text"'])
    return place.train()


@bad(INPUT, "line 3", "'text'", "'question+answer'", "--skip-bad-lines")
def mixed_formats(place):
    place.own_data([GOOD_LINE, GOOD_LINE, {"text": "Once upon a time"}])
    return place.train()


@bad(INPUT, "line 1", "no known format has the keys 'input_text', 'target_text'", "question+answer")
def unknown_format(place):
    place.own_data([{"input_text": "a", "target_text": "b"}])
    return place.train()


@bad(INPUT, "line 2", "'answer' is a JSON number, not a string")
def answer_that_is_no_text(place):
    place.own_data([GOOD_LINE, {"question": "What is 1 + 1?", "answer": 2}])
    return place.train()


@bad(INPUT, "line 1", "'narrator'", "known are", "assistant")
def unknown_role(place):
    place.own_data([{"messages": [{"role": "narrator", "content": "It was night."}]}])
    return place.train()


@bad(INPUT, "line 2", "messages[1].weight is 0.5", "may be 0", "or 1", "--skip-bad-lines")
def weight_between_0_and_1(place):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    place.own_data([{"messages": turns}, {"messages": [turns[0], {**turns[1], "weight": 0.5}]}])
    return place.train()


@bad(INPUT, "line 2", "does not show 'function_call' of assistant turn 1", "chat_template.jinja", "--skip-bad-lines")
def tool_calls_that_the_template_does_not_show(place):
    question = {"role": "user", "content": "What is 2 + 2?"}
    call = {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": "{}"}}
    place.own_data([{"messages": [question, {**question, "role": "assistant"}]}, {"messages": [question, call]}])
    return place.train()


@bad(INPUT, "line 2", "longer than 64 MiB", "--skip-bad-lines")
def line_of_a_gibibyte(place):
    place.own_data([GOOD_LINE])
    with place.data.open("ab") as file:
        file.write(b'{"question": "')
        file.truncate(2**30)  # zeros that take no room on the disk
    return place.train()


@bad(INPUT, "line 2", "3,000,0", "at most 1,048,576 can be used", "--skip-bad-lines")
def line_of_more_text_than_can_be_tokenised(place):
    place.own_data([GOOD_LINE, {"question": "x" * 3_000_000, "answer": "y"}])
    return place.train()


@bad(INPUT, "line 2", "200,000 messages", "at most 131,072 can be used", "--skip-bad-lines")
def conversation_of_more_messages_than_can_be_used(place):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    place.own_data([{"messages": turns}, {"messages": turns * 100_000}])
    return place.train()


@bad(INPUT, "line 2", "800 answers among 1,600 messages", "at most 1,048,576 can be rendered", "--skip-bad-lines")
def conversation_of_more_turns_than_can_be_found(place):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    (place.own_model() / "chat_template.jinja").write_text(template + "{% endfor %}")
    place.own_data([{"messages": turns}, {"messages": turns * 800}])
    return place.train()


@bad(INPUT, "line 2", r"\x1b[2J")
def escape_sequences_in_a_role(place):
    messages = [{"role": "\x1b[2J\x1b]0;owned\x07", "content": "a"}]
    place.own_data([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    with place.data.open("a") as file:
        file.write(json.dumps({"messages": messages}) + "\n")
    return place.train()


@bad(INPUT, "none of the 2 examples", "token to train on", "have assistant messages")
def data_without_an_answer(place):
    place.own_data([{"messages": [{"role": "user", "content": "Hello?"}]}] * 2)
    return place.train()


@bad(INPUT, "none of the 2 lines", "line 1", "question+answer")
def no_usable_line_with_skip_bad_lines(place):
    place.own_data(["{", "}"])
    return place.train("--skip-bad-lines")


@bad(INPUT, "held_out.jsonl does not exist", "check the path")
def validation_file_that_is_not_there(place):
    return place.train("--validation", str(place.root / "held_out.jsonl"))


@bad(SETTINGS, "--validation is 1.5", "a fraction between 0 and 1")
def validation_fraction_above_one(place):
    return place.train("--validation", "1.5")


@bad(INPUT, "1 example", "cannot be split", "leave --validation out")
def one_example_to_split(place):
    place.own_data([GOOD_LINE])
    return place.train("--validation", "0.5")


# -- options -----------------------------------------------------------------------------------------------------------


@bad(SETTINGS, "DATA is missing", "lopt-lite train MODEL DATA")
def forgotten_data(place):
    return ["train", str(place.model)]


@bad(SETTINGS, "--blocks is 3", "the model has 2 layers", "at most 2")
def more_blocks_than_layers(place):
    return place.train("--blocks", "3")


@bad(SETTINGS, "--last-layers is 2", "the model has 2 layers in 2 blocks", "at most 1")
def a_last_block_that_leaves_nothing(place):
    return place.train("--last-layers", "2")


@bad(SETTINGS, "--last-layers cuts off the last block", "leave one of them out")
def a_last_block_that_is_the_only_one(place):
    return place.train("--blocks", "1", "--last-layers", "1")


@bad(SETTINGS, "--objective names 'distil'", "reconstruct, task, match, none")
def unknown_objective(place):
    return place.train("--objective", "distil")


@bad(SETTINGS, "--objective match", "--quantize none changes nothing", "--quantize nf4")
def objective_match_without_quantising(place):
    return place.train("--objective", "match", "--quantize", "none")


@bad(SETTINGS, "--objective match", "--schedule sequential")
def objective_match_with_the_joint_schedule(place):
    return place.train("--objective", "match", "--quantize", "nf4", "--schedule", "joint")


@bad(SETTINGS, "too long for the file system")
def run_directory_with_a_name_of_300_characters(place):
    return place.train("--output", "x" * 300)


@bad(SETTINGS, "--seed is", "below 2**63")
def seed_of_65_bits(place):
    return place.train("--seed", str(2**64))


@bad(SETTINGS, "--lora-targets names 'query'", "q_proj")
def unknown_lora_target(place):
    return place.train("--lora-targets", "query")


@bad(SETTINGS, "--lr is", "above 0")
def learning_rate_that_is_no_number(place):
    return place.train("--lr", "nan")


@bad(SETTINGS, "--dtype", "bfloat16", "float32")
def unknown_dtype(place):
    return place.train("--dtype", "int4")


@bad(SETTINGS, "--device cuda", "--device cpu")
def cuda_on_a_machine_without(place):
    place.patch.setattr(torch.cuda, "is_available", lambda: False)
    return place.train("--device", "cuda")


@bad(SETTINGS, "options.yaml", "'learning-speed'", "no option", "lr")
def yaml_with_an_unknown_option(place):
    (place.root / "options.yaml").write_text("learning-speed: 3\n")
    return place.train("--config", "options.yaml")


@bad(SETTINGS, "options.yaml sets 'lora_r' and 'lora-r'", "the same option", "leave one of them out")
def yaml_with_one_option_in_two_spellings(place):
    (place.root / "options.yaml").write_text("lora_r: 8\nlora-r: 16\n")
    return place.train("--config", "options.yaml")


@bad(SETTINGS, "options.yaml", "not YAML")
def yaml_that_is_not_yaml(place):
    (place.root / "options.yaml").write_text("lr: [1, 2\nblocks: }")
    return place.train("--config", "options.yaml")


@bad(SETTINGS, "no-such.yaml", "No such file")
def yaml_that_is_not_there(place):
    return place.train("--config", "no-such.yaml")


@bad(SETTINGS, "--epochs is 'many'", "a whole number")
def yaml_with_a_value_of_the_wrong_type(place):
    (place.root / "options.yaml").write_text("epochs: many\n")
    return place.train("--config", "options.yaml")
