"""Tiny randomly initialized models in transformers' format, made on the spot."""

import torch


def tokenizer(folder, kind="plain"):
    """Byte-level BPE learnt from a few words, so that labels have one token or several, and share first tokens."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    names = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "sep_token": "<turn>",
    }
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(names.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(["very very negative positive railway railway"] * 5, trainer)
    if kind == "ends":
        end = [("</s>", inner.token_to_id("</s>"))]
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **names)
    made.save_pretrained(folder)
    return made


TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>me: {% endif %}"
)


def causal_model(folder, kind="llama", chat=False):
    import transformers as t

    made = tokenizer(folder)
    if chat:
        made.chat_template = TEMPLATE
        made.save_pretrained(folder)
    ids = dict(pad_token_id=made.pad_token_id, eos_token_id=made.eos_token_id, bos_token_id=made.bos_token_id)
    torch.manual_seed(0)
    if kind == "llama":
        shape = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
        config = t.LlamaConfig(vocab_size=len(made), intermediate_size=64, max_position_embeddings=512, **shape, **ids)
        model = t.LlamaForCausalLM(config)
    elif kind == "mistral":  # a cache that keeps only a window
        shape = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
        config = t.MistralConfig(vocab_size=len(made), intermediate_size=64, sliding_window=16, **shape, **ids)
        model = t.MistralForCausalLM(config)
    else:  # learned positions: wrong ones change the answer
        config = t.GPT2Config(vocab_size=len(made), n_layer=2, n_head=2, n_embd=32, n_positions=512, **ids)
        model = t.GPT2LMHeadModel(config)
    sharpen(model)
    model.save_pretrained(folder)
    return folder


def seq2seq_model(folder):
    import transformers as t

    made = tokenizer(folder, "ends")
    torch.manual_seed(0)
    config = t.T5Config(
        vocab_size=len(made), d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, pad_token_id=made.pad_token_id,
        eos_token_id=made.eos_token_id, decoder_start_token_id=made.pad_token_id,
    )  # fmt: skip
    sharpen(model := t.T5ForConditionalGeneration(config))
    model.save_pretrained(folder)
    return folder


def encoder(folder):
    import transformers as t

    made = tokenizer(folder, "ends")
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64)
    model = t.BertModel(t.BertConfig(vocab_size=len(made), max_position_embeddings=64, **shape))
    sharpen(model)
    model.save_pretrained(folder)
    return folder


def clip_model(folder, kind="clip"):
    """CLIP or SigLIP with its processor, for images of 32 pixels."""
    import transformers as t

    made = tokenizer(folder, "ends")
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64)
    text = dict(vocab_size=len(made), max_position_embeddings=64, **shape)
    text |= dict(eos_token_id=made.eos_token_id, bos_token_id=made.bos_token_id, pad_token_id=made.pad_token_id)
    vision = dict(image_size=32, patch_size=8, **shape)
    size = {"height": 32, "width": 32}
    if kind == "clip":
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        images = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        processor = t.CLIPProcessor(images, made)
    else:
        model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision))
        processor = t.SiglipProcessor(t.SiglipImageProcessor(size=size), made)
    sharpen(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def sharpen(model):
    """Weights ten times as large: outputs of random networks differ by input only slightly otherwise."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
