"""Tiny randomly initialized models in transformers' format, made on the spot."""

import torch
import transformers as t

SHAPE = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>me: {% endif %}"
)


def tokenizer(folder, ends=False, template=None):
    """Byte-level BPE learnt from a few words, so that labels have one token or several, and share
    first tokens. ends: every text is closed by </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    names = dict(pad="<pad>", eos="</s>", unk="<unk>", bos="<s>", sep="<turn>")
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(names.values()), initial_alphabet=alphabet
    )
    inner.train_from_iterator(["very very negative positive railway railway"] * 5, trainer)
    if ends:
        end = [("</s>", inner.token_to_id("</s>"))]
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    named = {f"{name}_token": token for name, token in names.items()}
    made = t.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **named)
    made.chat_template = template
    made.save_pretrained(folder)
    ids = {f"{name}_token_id": inner.token_to_id(names[name]) for name in ("pad", "eos", "bos")}
    torch.manual_seed(0)  # of the model that follows
    return made, dict(vocab_size=len(made), **ids)


def saved(model, folder):
    """The folder; weights are ten times as large, so that outputs differ by input."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    return folder


def causal_model(folder, kind="llama", chat=False):
    _, ids = tokenizer(folder, template=TEMPLATE if chat else None)
    rotary = SHAPE | ids | dict(num_key_value_heads=2, max_position_embeddings=512)
    if kind == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**rotary))
    elif kind == "mistral":  # a cache that keeps only a window
        model = t.MistralForCausalLM(t.MistralConfig(sliding_window=16, **rotary))
    else:  # learned positions: wrong ones change the answer
        config = t.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=512, **ids)
        model = t.GPT2LMHeadModel(config)
    return saved(model, folder)


def seq2seq_model(folder):
    _, ids = tokenizer(folder, ends=True)
    shape = dict(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    config = t.T5Config(decoder_start_token_id=ids["pad_token_id"], **shape, **ids)
    return saved(t.T5ForConditionalGeneration(config), folder)


def encoder(folder):
    made, _ = tokenizer(folder, ends=True)
    config = t.BertConfig(vocab_size=len(made), max_position_embeddings=64, **SHAPE)
    return saved(t.BertModel(config), folder)


def clip_model(folder, kind="clip"):
    """CLIP or SigLIP with its processor, for images of 32 pixels."""
    made, ids = tokenizer(folder, ends=True)
    text = dict(max_position_embeddings=64, **SHAPE, **ids)
    vision, size = dict(image_size=32, patch_size=8, **SHAPE), dict(height=32, width=32)
    configs = dict(text_config=text, vision_config=vision)
    if kind == "clip":
        model = t.CLIPModel(t.CLIPConfig(projection_dim=16, **configs))
        images = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        t.CLIPProcessor(images, made).save_pretrained(folder)
    else:
        model = t.SiglipModel(t.SiglipConfig(**configs))
        t.SiglipProcessor(t.SiglipImageProcessor(size=size), made).save_pretrained(folder)
    return saved(model, folder)
