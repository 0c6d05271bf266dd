//! Exit codes: 0 fine, 2 what the user gave us, 1 ours.
//!
//! One rule: an error is the user's when its chain holds a type that only speaks of what was
//! given to us: an argument, a file, a configuration, a disk. Everything else, panics included,
//! is ours.

use std::io;

/// An argument or file that this binary itself refuses. The text says what was wrong, what was
/// expected and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UserError(pub String);

/// A [`UserError`] ready to be returned.
pub fn user(text: impl Into<String>) -> anyhow::Error {
    UserError(text.into()).into()
}

/// The exit code of a failed verb.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.chain().any(is_users) { 2 } else { 1 }
}

fn is_users(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.is::<UserError>()
        || cause.is::<tercet_attention::Error>()
        || cause.is::<tercet_attention::SpecError>()
        || cause.is::<serde_json::Error>()
        || cause.is::<toml::de::Error>()
        || cause.downcast_ref::<io::Error>().is_some_and(is_users_io)
}

/// A path that is missing, forbidden or of the wrong kind, a full or read-only disk: the user can
/// put it right. Anything else the system refuses us is not the user's.
fn is_users_io(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::NotFound
            | Kind::PermissionDenied
            | Kind::AlreadyExists
            | Kind::NotADirectory
            | Kind::IsADirectory
            | Kind::DirectoryNotEmpty
            | Kind::InvalidFilename
            | Kind::InvalidData
            | Kind::UnexpectedEof
            | Kind::ReadOnlyFilesystem
            | Kind::StorageFull
            | Kind::QuotaExceeded
            | Kind::FileTooLarge
    )
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn the_users_errors_exit_2_through_any_context_and_ours_exit_1() {
        let missing = io::Error::from(io::ErrorKind::NotFound);
        let users: [anyhow::Error; 3] = [
            user("no such verb"),
            tercet_attention::Error::CuSeqlens("decreases".into()).into(),
            Err::<(), _>(missing).context("reading x").context("quickstart").unwrap_err(),
        ];
        for error in users {
            assert_eq!(exit_code(&error), 2, "{error:#}");
        }
        let ours = [anyhow::anyhow!("a bug"), io::Error::from(io::ErrorKind::OutOfMemory).into()];
        for error in ours {
            assert_eq!(exit_code(&error), 1, "{error:#}");
        }
    }
}
