//! Rows become questions: columns and templates, as lm-eval resolves them.
//!
//! A template comes with a task file, perhaps from strangers. It cannot read files or the network,
//! and what it may compute is bounded by fuel.

use std::collections::HashSet;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, UndefinedBehavior};
use serde_json::Value;
use tercet_model::chat_methods;

use crate::error::{Error, Result};
use crate::python;
use crate::rows::Row;
use crate::task::{Choices, Output, Task};

/// Instructions and 64-byte pieces of data that a template may cost for one row.
const FUEL: u64 = 500_000;

/// Stack of the templates: printing a value as deep as fuel lets it grow takes this much at most.
const STACK: usize = 1 << 28;

/// A question to a model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    /// The row it was made of.
    pub row: usize,
    /// What stands before the answer.
    pub context: String,
    /// What can be chosen; empty where nothing can.
    pub choices: Vec<String>,
    /// What is right.
    pub target: Target,
}

/// What is right.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Target {
    /// Choices.
    Choices(Vec<usize>),
    /// Texts, any of which will do.
    Texts(Vec<String>),
}

/// The questions of `rows`, the first ones of a task's data; `columns` are those of all data.
pub(crate) fn items(task: &Task, rows: &[Row], columns: &HashSet<String>) -> Result<Vec<Item>> {
    let make = || {
        let templates = Templates::new(task, columns)?;
        rows.iter().enumerate().map(|(row, fields)| templates.item(row, fields)).collect()
    };
    let failed = |what: &str| Error::Ask(format!("task {}: its templates {what}", task.name));
    // A template can build a value as deep as its fuel lasts, and dropping it recurses.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, make);
        let thread = thread.map_err(|e| failed(&format!("cannot be run: {e}")))?;
        thread.join().unwrap_or_else(|_| Err(failed("made their engine fail")))
    })
}

struct Templates<'t> {
    task: &'t Task,
    columns: &'t HashSet<String>,
    environment: Environment<'t>,
}

impl<'t> Templates<'t> {
    fn new(task: &'t Task, columns: &'t HashSet<String>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        // As lm-eval sets its own Jinja up.
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Ask(e.to_string()))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(chat_methods::call);
        environment.set_formatter(|out, _, value| {
            let invalid = |text| minijinja::Error::new(ErrorKind::InvalidOperation, text);
            out.write_str(&python::print(value).map_err(invalid)?)
                .map_err(|e| invalid(e.to_string()))
        });
        // Both print otherwise than in Python.
        environment.remove_filter("tojson");
        environment.remove_filter("pprint");
        environment.remove_global("debug");
        let mut templates = Self { task, columns, environment };
        let choices = match &task.choices {
            Some(Choices::Text(text)) => Some(("doc_to_choice", text.as_str())),
            _ => None,
        };
        let description = task.description.as_deref().map(|text| ("description", text));
        let target = task.target.as_str().map(|text| ("doc_to_target", text));
        let fields = [Some(("doc_to_text", task.text.as_str())), description, choices, target];
        for (key, source) in fields.into_iter().flatten() {
            if !columns.contains(source) {
                templates.environment.add_template(key, source).map_err(|e| {
                    Error::Ask(format!("task {}: {key} cannot be parsed: {e}", task.name))
                })?;
            }
        }
        Ok(templates)
    }

    fn item(&self, row: usize, fields: &Row) -> Result<Item> {
        self.build(row, fields).map_err(|reason| Error::Row {
            task: self.task.name.clone(),
            row,
            reason,
        })
    }

    fn build(&self, row: usize, fields: &Row) -> std::result::Result<Item, String> {
        let task = self.task;
        let text = |key: &str, source: &str| match self.resolve(key, source, fields)? {
            Value::String(text) => Ok(text),
            other => Err(format!("{key} is the column {source}, which holds {other}, not a text")),
        };
        let question = text("doc_to_text", &task.text)?;
        let digits = !question.is_empty() && question.bytes().all(|b| b.is_ascii_digit());
        if digits && task.choices.is_some() && !self.columns.contains(&task.text) {
            return Err(format!(
                "doc_to_text gives the number {question}: lm-eval takes it for one of several \
                 contexts, which is not supported"
            ));
        }
        let description = match &task.description {
            Some(source) => text("description", source)?,
            None => String::new(),
        };
        let choices = self.choices(fields)?;
        let target = match &task.target {
            Value::String(source) => self.target(source, fields)?,
            number => number.clone(),
        };
        let target = match task.output {
            Output::MultipleChoice => Target::Choices(right(&choices, target)?),
            _ if !choices.is_empty() => {
                let at = right(&choices, target)?;
                Target::Texts(at.into_iter().map(|at| choices[at].clone()).collect())
            }
            Output::Loglikelihood => match target {
                Value::String(text) => Target::Texts(vec![text]),
                other => return Err(format!("doc_to_target is {other}; expected a text")),
            },
            Output::GenerateUntil => Target::Texts(texts(target)?),
        };
        Ok(Item { row, context: description + &question, choices, target })
    }

    /// A column's value, or the text of a template.
    fn resolve(&self, key: &str, source: &str, fields: &Row) -> std::result::Result<Value, String> {
        if self.columns.contains(source) {
            let value = fields.get(source).filter(|value| !value.is_null());
            return value.cloned().ok_or_else(|| format!("has no column {source} for {key}"));
        }
        let template = self.environment.get_template(key).map_err(|e| e.to_string())?;
        template.render(minijinja::Value::from(Serde(fields))).map(Value::String).map_err(|e| {
            match e.kind() {
                ErrorKind::OutOfFuel => {
                    format!("{key} did not end within its limit of steps; it is broken or hostile")
                }
                ErrorKind::UndefinedError => {
                    let known: Vec<&str> = fields.keys().map(String::as_str).collect();
                    format!("{key} names what is not there ({e}); there are {}", known.join(", "))
                }
                _ => format!("{key}: {e}"),
            }
        })
    }

    fn choices(&self, fields: &Row) -> std::result::Result<Vec<String>, String> {
        let value = match &self.task.choices {
            None => return Ok(Vec::new()),
            Some(Choices::Fixed(list)) => return Ok(list.clone()),
            Some(Choices::Text(source)) => match self.resolve("doc_to_choice", source, fields)? {
                Value::String(text) if !self.columns.contains(source) => python::literal(&text)
                    .ok_or_else(|| format!("doc_to_choice gives no list but {text}"))?,
                value => value,
            },
        };
        let Value::Array(list) = value else {
            return Err(format!("doc_to_choice gives {value}; expected a list of texts"));
        };
        if list.is_empty() {
            return Err("doc_to_choice gives an empty list".into());
        }
        let text = |value| match value {
            Value::String(text) if !text.is_empty() => Ok(text),
            other => {
                Err(format!("doc_to_choice has {other}; choices are texts that are not empty"))
            }
        };
        list.into_iter().map(text).collect()
    }

    /// What lm-eval makes of `doc_to_target`: a column as it is, a template's text, or the number
    /// or list that the text is.
    fn target(&self, source: &str, fields: &Row) -> std::result::Result<Value, String> {
        let value = self.resolve("doc_to_target", source, fields)?;
        let Value::String(text) = &value else { return Ok(value) };
        if self.columns.contains(source) {
            return Ok(value);
        }
        if !text.is_empty()
            && text.bytes().all(|b| b.is_ascii_digit())
            && self.task.choices.is_some()
        {
            return text.parse::<i64>().map(Value::from).map_err(|e| format!("{text}: {e}"));
        }
        if text.len() >= 2 && text.starts_with('[') && text.ends_with(']') {
            return Ok(python::literal(text).unwrap_or(value));
        }
        Ok(value)
    }
}

/// The places of the right choices.
fn right(choices: &[String], target: Value) -> std::result::Result<Vec<usize>, String> {
    let place = |value: &Value| {
        let at = match value {
            Value::String(text) => choices.iter().position(|choice| choice == text),
            number => number.as_u64().map(|at| at as usize).filter(|&at| at < choices.len()),
        };
        at.ok_or_else(|| {
            let count = choices.len();
            format!("doc_to_target gives {value}, which is none of the {count} choices")
        })
    };
    match &target {
        Value::Array(list) if list.is_empty() => Err("doc_to_target gives an empty list".into()),
        Value::Array(list) => list.iter().map(place).collect(),
        one => Ok(vec![place(one)?]),
    }
}

/// Targets of a written text, as Python writes them.
fn texts(target: Value) -> std::result::Result<Vec<String>, String> {
    Ok(vec![match target {
        Value::String(text) => text,
        Value::Bool(flag) => (if flag { "True" } else { "False" }).into(),
        Value::Number(number) if number.is_f64() => {
            python::float(number.as_f64().unwrap_or_default())
        }
        Value::Number(number) => number.to_string(),
        Value::Array(list) if !list.is_empty() => {
            let text = |value| match value {
                Value::String(text) => Ok(text),
                other => Err(format!("doc_to_target has {other} in its list; expected texts")),
            };
            return list.into_iter().map(text).collect();
        }
        other => return Err(format!("doc_to_target is {other}; expected a text")),
    }])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::task::Metric;

    fn task(output: Output, text: &str, choices: Option<&str>, target: Value) -> Task {
        Task {
            name: "t".into(),
            output,
            metrics: vec![Metric::Acc],
            ignored: vec![],
            data: vec![],
            description: None,
            text: text.into(),
            choices: choices.map(|c| Choices::Text(c.into())),
            target,
            delimiter: " ".into(),
            until: vec![],
            max_tokens: 4,
        }
    }

    fn run(task: &Task, rows: &[Value]) -> Result<Vec<Item>> {
        let rows: Vec<Row> = rows.iter().map(|row| row.as_object().unwrap().clone()).collect();
        items(task, &rows, &crate::rows::columns(&rows))
    }

    #[test]
    fn columns_and_templates_give_the_same_question() {
        let row = json!({ "q": "Why?", "c": ["it's", "b"], "gold": 1, "answer": "b" });
        let wanted = Item {
            row: 0,
            context: "Why?".into(),
            choices: vec!["it's".into(), "b".into()],
            target: Target::Choices(vec![1]),
        };
        for text in ["q", "{{q}}"] {
            for choices in ["c", "{{c}}", "[\"it's\", '{{c[1]}}']"] {
                for target in [
                    json!("gold"),
                    json!("{{gold}}"),
                    json!(1),
                    json!("answer"),
                    json!("[{{gold}}]"),
                ] {
                    let task = task(Output::MultipleChoice, text, Some(choices), target);
                    let found = run(&task, std::slice::from_ref(&row)).unwrap();
                    assert_eq!(found, std::slice::from_ref(&wanted), "{task:?}");
                }
            }
        }
    }

    #[test]
    fn a_description_stands_before_and_ends_of_lines_stay() {
        let mut task = task(Output::GenerateUntil, "Q: {{q}}\n", None, json!("{{n}}"));
        task.description = Some("Answer.\n\n".into());
        let items = run(&task, &[json!({ "q": "x", "n": 3.0 }), json!({ "q": "y", "n": 12 })]);
        let items = items.unwrap();
        assert_eq!(items[0].context, "Answer.\n\nQ: x\n");
        assert_eq!(items[0].target, Target::Texts(vec!["3.0".into()]));
    }

    #[test]
    fn hostile_and_broken_templates_are_refused_with_the_row() {
        let forever = "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}\
                       {% endfor %}";
        let rows = [json!({ "q": "a", "c": ["x"], "g": 0 }), json!({ "c": ["x"], "g": 7 })];
        for (text, choices, target, part) in [
            (forever, None, json!("g"), "row 0"),
            ("{{q}}", None, json!("{{g}}"), "row 1"),
            ("q", None, json!("{{g}}"), "row 1 (counted from 0): has no column q"),
            ("{{nothing}}", None, json!("g"), "names what is not there"),
            ("{{q | tojson}}", None, json!("g"), "tojson"),
            ("{{ 'x' * 1000000000 }}", None, json!("g"), "row 0"),
            ("{{", None, json!("g"), "cannot be parsed"),
            ("{% include 'x' %}", None, json!("g"), "row 0"),
            ("t", Some("c"), json!("g"), "row 1 (counted from 0): doc_to_target gives 7"),
            ("t", Some("c"), json!("y"), "gives \"y\""),
            ("t", Some("g"), json!(0), "expected a list"),
            ("t", Some("{{g}}"), json!(0), "expected a list"),
            ("t", Some("['']"), json!(0), "not empty"),
            ("t", Some("[]"), json!(0), "empty list"),
            ("12", Some("c"), json!(0), "one of several contexts"),
        ] {
            let output =
                if choices.is_some() { Output::MultipleChoice } else { Output::GenerateUntil };
            let task = task(output, text, choices, target);
            let error = run(&task, &rows).unwrap_err();
            assert!(error.to_string().contains(part) && error.is_users(), "{text}: {error}");
        }
    }
}
