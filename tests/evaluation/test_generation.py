import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dft_lightning.errors import UserError
from dft_lightning.evaluation.generation import generate

WORDS = [f"w{i}" for i in range(40)]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13", "w14", "w15 w16 w17 w18 w19", "w20 w21 w22"]


def tiny_tokenizer(**special):
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def tiny_model(**changes):
    torch.manual_seed(0)
    settings = {"vocab_size": 43, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | changes
    # Weights of this size make the answers differ from prompt to prompt.
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, **settings)
    )


def naive(model, tokenizer, prompt, count):
    """Greedy without batch, padding, cache or stop: the definition."""
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def model():
    return tiny_model().eval()


@pytest.fixture(scope="module")
def expected():
    """The naive answers; the seed is one with which they all differ and none holds an <eos>."""
    model, tokenizer = tiny_model().eval(), tiny_tokenizer(eos_token="<eos>")
    ids = [naive(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert all(tokenizer.eos_token_id not in row for row in ids)
    assert len({tuple(row) for row in ids}) == len(PROMPTS)
    return tokenizer.batch_decode(ids)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_a_batch_answers_as_each_prompt_alone_and_in_order(model, tokenizer, expected, batch_size):
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected


@pytest.mark.parametrize("position", [0, 4, 11])
def test_an_answer_ends_before_a_stop_token(model, tokenizer, expected, position):
    stop = expected[2].split()[position]
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12, stop_ids=[tokenizer.convert_tokens_to_ids(stop)])
    assert answers == [" ".join(_before(stop, answer.split())) for answer in expected]
    assert answers[2] != expected[2]


def test_the_end_of_sequence_token_stops_too(model, expected):
    word = expected[0].split()[3]
    answers = generate(model, tiny_tokenizer(pad_token="<pad>", eos_token=word), PROMPTS, max_new_tokens=12)
    assert answers == [" ".join(_before(word, answer.split())) for answer in expected]


def _before(stop, words):
    return words[: words.index(stop)] if stop in words else words


@pytest.mark.parametrize("special", [{}, {"eos_token": "<eos>"}], ids=["no pad, no eos", "no pad"])
def test_a_tokenizer_without_a_pad_token(model, expected, special):
    tokenizer = tiny_tokenizer(**special)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3) == expected
    assert tokenizer.pad_token is None


def test_no_special_token_is_added(model, tokenizer, expected):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", 1)])
    assert tokenizer("w1")["input_ids"][0] == tokenizer.eos_token_id
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected


def test_the_models_own_generation_settings_do_not_interfere(model, tokenizer, expected):
    model.generation_config.update(
        repetition_penalty=9.0,
        do_sample=True,
        temperature=7.0,
        max_length=3,
        suppress_tokens=[5, 6, 7],
        use_cache=False,
    )
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected


def test_dropout_is_off(tokenizer):
    quiet, noisy = tiny_model().eval(), tiny_model(attention_dropout=0.9).train()
    assert generate(noisy, tokenizer, PROMPTS, max_new_tokens=12) == generate(
        quiet, tokenizer, PROMPTS, max_new_tokens=12
    )


def test_model_tokenizer_and_rng_are_left_as_they_were(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    own_config, contents = model.generation_config, copy.deepcopy(model.generation_config.to_dict())
    side, rng = tokenizer.padding_side, torch.get_rng_state()
    generate(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert [module.training for module in model.modules()] == flags
    assert model.generation_config is own_config
    assert own_config.to_dict() == contents
    assert tokenizer.padding_side == side
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()


def test_a_failure_leaves_the_model_as_it_was(model, tokenizer):
    def stop(done, total):
        raise KeyboardInterrupt

    own_config = model.train().generation_config
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, PROMPTS, max_new_tokens=2, on_batch=stop)
    assert model.training
    assert model.generation_config is own_config


def test_the_cache_is_used_even_where_training_switched_it_off(model, tokenizer, expected):
    model.config.use_cache = False
    lengths = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected
    assert lengths == [7, *[1] * 11]
    assert model.config.use_cache is False


def test_an_adapters_model_answers_with_its_adapter(model, tokenizer, expected):
    own_config = model.generation_config
    own_config.repetition_penalty = 9.0
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    assert generate(adapted, tokenizer, PROMPTS, max_new_tokens=12) == expected  # a fresh adapter adds nothing
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    changed = generate(adapted, tokenizer, PROMPTS, max_new_tokens=12)
    assert changed != expected
    assert changed == tokenizer.batch_decode([naive(adapted.eval(), tokenizer, prompt, 12) for prompt in PROMPTS])
    assert adapted.generation_config is own_config


def test_no_graph_is_recorded(model, tokenizer):
    recorded = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    generate(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert recorded == [False, False]


def test_progress_is_told_after_each_batch(model, tokenizer):
    told = []
    generate(
        model,
        tokenizer,
        PROMPTS,
        max_new_tokens=1,
        batch_size=3,
        on_batch=lambda done, total: told.append((done, total)),
    )
    assert told == [(3, 7), (6, 7), (7, 7)]


def test_no_prompt_no_answer(model, tokenizer):
    assert generate(model, tokenizer, [], max_new_tokens=1) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["w1", ""], {"max_new_tokens": 1}, "prompt 1"),
        (["w1"], {"max_new_tokens": 0}, "max_new_tokens"),
        (["w1"], {"max_new_tokens": 1, "batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, tokenizer, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, tokenizer, prompts, **options)


@pytest.mark.slow
def test_a_real_model_answers_real_questions(embedded_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir, dtype=torch.float32)
    questions = ["What is 2 + 2?", "What is the capital of France? Answer in one word.", "Which colour is the sky?"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    answers = generate(model, tokenizer, prompts, max_new_tokens=16)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=16)[0] for prompt in prompts]
    assert answers == alone
    assert "4" in answers[0]
    assert "Paris" in answers[1]
    assert not any("<|im_" in answer for answer in answers)
