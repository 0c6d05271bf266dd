//! The names a config section knows, and the nearest one to a name it does not.

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// Field names of a struct that derives `Deserialize`; they are declared nowhere else.
pub fn keys_of<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    // The error is the expected outcome: no value is deserialized, only the names are taken.
    let _ = T::deserialize(FieldNames(&mut fields));
    fields
}

/// A deserializer without a value: it notes which fields a struct asks for.
struct FieldNames<'a>(&'a mut &'static [&'static str]);

/// Says that names were noted and there is no value.
#[derive(Debug, thiserror::Error)]
#[error("no value")]
struct NoValue;

impl de::Error for NoValue {
    fn custom<T: std::fmt::Display>(_: T) -> Self {
        Self
    }
}

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = NoValue;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, NoValue> {
        *self.0 = fields;
        Err(NoValue)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, NoValue> {
        Err(NoValue)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// `is not a known key; did you mean …?`, or all known keys when none is near.
pub fn unknown(key: &str, section: &str, known: &[&str]) -> String {
    let dotted = |name: &str| match section {
        "" => name.to_owned(),
        _ => format!("{section}.{name}"),
    };
    let nearest = known
        .iter()
        .map(|name| (strsim::damerau_levenshtein(key, name), *name))
        .filter(|(distance, name)| *distance <= 1 + key.len().max(name.len()) / 3)
        .min();
    match nearest {
        Some((_, name)) => format!("is not a known key; did you mean `{}`?", dotted(name)),
        None => {
            let names: Vec<String> = known.iter().map(|name| dotted(name)).collect();
            format!("is not a known key; known here: {}", names.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CheckpointConfig, TrainConfig};

    #[test]
    fn the_names_come_from_the_struct_itself() {
        assert_eq!(keys_of::<CheckpointConfig>(), ["every", "keep"]);
        assert!(keys_of::<TrainConfig>().contains(&"batch_tokens"));
    }

    #[test]
    fn a_slip_of_the_finger_is_answered_with_the_right_name() {
        let known = keys_of::<TrainConfig>();
        assert!(unknown("warm_up", "train", known).ends_with("did you mean `train.warmup`?"));
        assert!(unknown("batch_token", "train", known).contains("`train.batch_tokens`"));
        assert!(unknown("xyzzy", "train", known).contains("known here: train.steps,"));
    }
}
