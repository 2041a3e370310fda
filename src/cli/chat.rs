//! `margay generate --chat`: turns of a conversation, the state of each layer kept between them.

use std::io::{IsTerminal, stdin};

use margay::data::chat::ASSISTANT;
use margay::data::{Chat, ChatTemplate};
use margay::error::{Error, Kind, Result};
use margay::evaluate::Subject;
use margay::generate::{Continuation, Generated};

use super::generate::Writer;
use super::output::Output;

/// Tokens that fixed memory is set aside for at a time; a conversation that outgrows them is read again.
const ROOM: usize = 4096;

/// A conversation with what the state of the model has seen of it.
pub struct Conversation<'a> {
    model: Subject<'a>,
    template: &'a ChatTemplate,
    writer: Writer<'a>,
    chat: Chat,
    continuation: Continuation<'a>,
    /// The text the continuation has read and written; the token that ended it is not in it.
    seen: String,
}

impl<'a> Conversation<'a> {
    pub fn new(model: Subject<'a>, template: &'a ChatTemplate, writer: Writer<'a>, system: Option<&str>) -> Self {
        let mut chat = Chat::default();
        system.into_iter().for_each(|text| chat.push("system", text));
        let continuation = Continuation::new(model, ROOM.max(writer.most));
        Conversation { model, template, writer, chat, continuation, seen: String::new() }
    }

    /// Sends `message` and writes the answer as it comes; how many tokens were read for it, and what was done.
    ///
    /// What is new is what the text of the template has beyond the text seen. Where it does not begin with that (some
    /// templates drop the thoughts of earlier turns), all of it is read again.
    pub fn turn(&mut self, message: &str, out: &Output) -> Result<(usize, Generated)> {
        self.chat.push("user", message);
        let text = self.template.render(&self.chat, true)?;
        let new = text.strip_prefix(self.seen.as_str()).filter(|_| !self.seen.is_empty());
        let mut prompt = new.map_or(Ok(Vec::new()), |new| self.writer.tokenizer.encode(new))?;
        if prompt.is_empty() || !self.continuation.fits(prompt.len() + self.writer.most) {
            prompt = self.writer.tokenizer.encode(&text)?;
            self.continuation = Continuation::new(self.model, ROOM.max(self.writer.most));
        }
        if prompt.is_empty() {
            return Err(Error::new(Kind::Usage, "the chat template makes no text of the conversation"));
        }
        let (answer, done) = self.writer.write(&mut self.continuation, &prompt, out)?;
        self.seen = text + &answer;
        self.chat.push(ASSISTANT, &answer);
        Ok((prompt.len(), done))
    }

    /// Answers each line of stdin until it ends.
    pub fn lines(&mut self, out: &Output) -> Result<()> {
        let (mut lines, asks) = (stdin().lines(), stdin().is_terminal());
        while !out.closed() {
            if asks {
                out.ask("> ");
            }
            let Some(line) = lines.next() else { break };
            let line = line.map_err(|e| Error::io("read a message from", "stdin", e))?;
            if !line.trim().is_empty() {
                self.turn(&line, out)?;
            }
        }
        Ok(())
    }
}
