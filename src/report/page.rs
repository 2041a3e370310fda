//! A page of HTML in one file: style, tables and figures within, nothing to load.

use std::fmt::Write;

use crate::convert::plan::Section;
use crate::plot::{self, Figure, escape};

/// A page as it grows; parts without content leave no trace.
pub struct Page {
    title: String,
    lead: String,
    /// Anchor, heading and content.
    parts: Vec<(&'static str, &'static str, String)>,
}

impl Page {
    pub fn new(title: &str) -> Self {
        Page { title: title.into(), lead: String::new(), parts: Vec::new() }
    }

    /// A line under the title.
    pub fn lead(&mut self, text: &str) {
        _ = writeln!(self.lead, "<p class=\"quiet\">{}</p>", escape(text));
    }

    /// Large figures with their names, under the title.
    pub fn facts(&mut self, facts: &[(&str, String)]) {
        let fact = |(name, value): &(&str, String)| {
            format!("<div><dt>{}</dt><dd>{}</dd></div>\n", escape(name), escape(value))
        };
        let all: String = facts.iter().map(fact).collect();
        _ = write!(self.lead, "<dl class=\"facts\">\n{all}</dl>\n");
    }

    /// A part with its heading, where `content` holds anything.
    pub fn part(&mut self, id: &'static str, heading: &'static str, content: String) {
        if !content.is_empty() {
            self.parts.push((id, heading, content));
        }
    }

    /// The whole file.
    pub fn html(&self) -> String {
        let title = escape(&self.title);
        let links = self.parts.iter().map(|(id, heading, _)| format!("<a href=\"#{id}\">{heading}</a>\n"));
        let mut html = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
             <style>\n{}{}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n{}<nav>\n{}</nav>\n</header>\n",
            plot::STYLE,
            include_str!("style.css"),
            self.lead,
            links.collect::<String>()
        );
        for (id, heading, content) in &self.parts {
            _ = write!(html, "<section id=\"{id}\">\n<h2>{heading}</h2>\n{content}</section>\n");
        }
        html + "</body>\n</html>\n"
    }
}

/// Figures side by side where there is room.
pub fn figures(figures: &[Figure]) -> String {
    if figures.is_empty() {
        return String::new();
    }
    let all: String = figures.iter().map(|f| f.svg.as_str()).collect();
    format!("<div class=\"figures\">\n{all}</div>\n")
}

/// A table under its title; empty where it has no row.
pub fn table(section: &Section) -> String {
    if section.rows.is_empty() {
        return String::new();
    }
    let width = section.rows.iter().map(Vec::len).max().unwrap_or(0);
    let numeric = |column: usize| {
        let mut said = section.rows.iter().filter_map(|row| row.get(column)).filter(|c| !c.is_empty() && *c != "–");
        let digit =
            |c: &String| c.trim_start().trim_start_matches(['-', '+', '±']).starts_with(|c: char| c.is_ascii_digit());
        column > 0 && !section.columns.is_empty() && said.all(digit)
    };
    let right: Vec<&str> = (0..width).map(|c| if numeric(c) { " class=\"number\"" } else { "" }).collect();
    let mut html = String::new();
    if !section.title.is_empty() {
        _ = writeln!(html, "<h3>{}</h3>", escape(section.title));
    }
    html += "<div class=\"wide\"><table>\n";
    if !section.columns.is_empty() {
        let heads = section.columns.iter().zip(&right).map(|(name, right)| format!("<th{right}>{}</th>", escape(name)));
        _ = writeln!(html, "<tr>{}</tr>", heads.collect::<String>());
    }
    for row in &section.rows {
        let cell = |(text, right): (&String, &&str)| match text.as_str() {
            "ok" => "<td class=\"ok\">ok</td>".to_string(),
            "FAILED" => "<td class=\"failed\">FAILED</td>".to_string(),
            text => format!("<td{right}>{}</td>", escape(text)),
        };
        _ = writeln!(html, "<tr>{}</tr>", row.iter().zip(&right).map(cell).collect::<String>());
    }
    html + "</table></div>\n"
}

/// Text as it is, in letters of one width.
pub fn verbatim(text: &str) -> String {
    format!("<pre>{}</pre>\n", escape(text))
}
