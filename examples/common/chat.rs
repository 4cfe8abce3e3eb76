//! The turns that an instruction-tuned model expects its prompt in.

/// A chat format, recognised by the markers of the model's template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// A base model: the prompt as it is.
    Plain,
    /// SmolLM2, Qwen and many others; `system` is the message that opens a conversation which has none of its own.
    ChatMl { system: Option<String> },
    /// Llama 3.
    Llama3,
    /// Gemma.
    Gemma,
    /// Phi-3.
    Phi3,
    /// Phi-4, which has the markers of ChatML and one more.
    Phi4,
}

impl Format {
    /// The format of a Jinja chat template.
    pub fn detect(template: &str) -> Self {
        if template.contains("<|im_sep|>") {
            Self::Phi4
        } else if template.contains("<|im_start|>") {
            Self::ChatMl { system: default_system(template) }
        } else if template.contains("<|start_header_id|>") {
            Self::Llama3
        } else if template.contains("<start_of_turn>") {
            Self::Gemma
        } else if template.contains("<|assistant|>") && template.contains("<|end|>") {
            Self::Phi3
        } else {
            Self::Plain
        }
    }

    /// `prompt` as the user's turn, up to where the assistant's begins.
    pub fn wrap(&self, prompt: &str) -> String {
        match self {
            Self::Plain => prompt.to_string(),
            Self::ChatMl { system } => {
                let system =
                    system.as_ref().map(|text| format!("<|im_start|>system\n{text}<|im_end|>\n")).unwrap_or_default();
                format!("{system}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
            }
            Self::Llama3 => format!(
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>\
                 <|start_header_id|>assistant<|end_header_id|>\n\n",
                prompt.trim()
            ),
            Self::Gemma => {
                format!("<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", prompt.trim())
            }
            Self::Phi3 => format!("<|user|>\n{prompt}<|end|>\n<|assistant|>\n"),
            Self::Phi4 => {
                format!("<|im_start|>user<|im_sep|>{prompt}<|im_end|><|im_start|>assistant<|im_sep|>")
            }
        }
    }

    /// The token that ends the assistant's turn.
    pub fn turn_end(&self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::ChatMl { .. } | Self::Phi4 => Some("<|im_end|>"),
            Self::Llama3 => Some("<|eot_id|>"),
            Self::Gemma => Some("<end_of_turn>"),
            Self::Phi3 => Some("<|end|>"),
        }
    }
}

/// The system message that a ChatML template spells out; anything with quotes or braces is an expression instead.
fn default_system(template: &str) -> Option<String> {
    template.split("<|im_start|>system").skip(1).find_map(|rest| {
        let text = rest.split_once("<|im_end|>")?.0;
        // A newline, or its escape within a Jinja string.
        let text = text.strip_prefix('\n').or_else(|| text.strip_prefix("\\n"))?;
        let spelled_out = !text.is_empty() && !text.contains(['\'', '"', '{', '}']);
        spelled_out.then(|| text.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smollm2_greets_as_its_template_does() {
        let chat = Format::detect(
            "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n\
             You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}",
        );
        assert_eq!(
            chat.wrap("Hi"),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
             <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(chat.turn_end(), Some("<|im_end|>"));
    }

    #[test]
    fn qwen_has_its_own_system_message_or_none() {
        let qwen2_5 = r"
            {%- if tools %}{{- '<|im_start|>system\n' }}{{- messages[0]['content'] + '<|im_end|>' }}{% endif %}
            {{- '<|im_start|>system\nYou are Qwen. You are a helpful assistant.<|im_end|>\n' }}";
        let system = Some("You are Qwen. You are a helpful assistant.".to_string());
        assert_eq!(Format::detect(qwen2_5), Format::ChatMl { system });

        let qwen3 = r"{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}";
        assert_eq!(Format::detect(qwen3), Format::ChatMl { system: None });
        assert_eq!(Format::detect(qwen3).wrap("Hi"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn llama3_has_headers() {
        let chat = Format::detect("{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>' }}");
        assert_eq!(
            chat.wrap(" Hi\n"),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n"
        );
        assert_eq!(chat.turn_end(), Some("<|eot_id|>"));
    }

    #[test]
    fn gemma_and_phi_have_turns_of_their_own() {
        for (template, turn, end) in [
            (
                "{{ bos_token }}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
                "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
                "<end_of_turn>",
            ),
            (
                "{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}{{ '<|assistant|>\n' }}",
                "<|user|>\nHi<|end|>\n<|assistant|>\n",
                "<|end|>",
            ),
            (
                "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}",
                "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
                "<|im_end|>",
            ),
        ] {
            let format = Format::detect(template);
            assert_eq!((format.wrap("Hi").as_str(), format.turn_end()), (turn, Some(end)));
        }
    }

    #[test]
    fn other_models_get_the_prompt_as_it_is() {
        assert_eq!(Format::detect(""), Format::Plain);
        assert_eq!(Format::Plain.wrap(" Hi\n"), " Hi\n");
    }
}
