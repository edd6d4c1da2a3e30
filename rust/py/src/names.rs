//! What the core's variants are called in Python.

use zerort_core::{Command, Dtype, PassKind};

/// The dtype's name in Python.
pub const fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "f32",
        Dtype::F16 => "f16",
        Dtype::BF16 => "bf16",
        Dtype::F64 => "f64",
    }
}

/// The command's name in Python.
pub const fn kind(command: Command) -> &'static str {
    match command {
        Command::Launch(_) => "launch",
        Command::Retire(_) => "retire",
        Command::Need(_) => "need",
        Command::Gather(_) => "gather",
        Command::Free(_) => "free",
    }
}

/// The kind's name in Python.
pub const fn pass_name(kind: PassKind) -> &'static str {
    match kind {
        PassKind::Forward => "forward",
        PassKind::Backward => "backward",
        PassKind::LocalBackward => "local_backward",
        PassKind::Evaluation => "evaluation",
    }
}
