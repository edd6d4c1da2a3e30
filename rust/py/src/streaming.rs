//! A copy that leaves the processor's caches alone.
//!
//! An ordinary store reads the line that it is about to overwrite, so that a large copy moves three
//! bytes for each. Stores past the caches move two, and push out nothing that the next step wants.
//! Four pages are read at a time, each by a stream of its own, because one stream waits for memory
//! more often than it is served.

use std::sync::{Mutex, PoisonError};
use std::thread;

/// Bytes from which on caches cannot hold the copy for whoever reads it next.
const LARGE: usize = 1 << 20;
/// Bytes that are worth a thread.
const SHARE: usize = 1 << 22;

/// Copies `source` into `target`, which is as long, on at most `threads` threads.
///
/// # Panics
/// If it is not.
pub fn copy(source: &[u8], target: &mut [u8], threads: usize) {
    assert_eq!(source.len(), target.len(), "a copy is as long as what is copied");
    let share = source.len().div_ceil(threads.max(1)).max(SHARE);
    let others = source.len().div_ceil(share).saturating_sub(1);
    let parts = Mutex::new(source.chunks(share).zip(target.chunks_mut(share)));
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((from, into)) = next() {
            copy_part(from, into);
        }
    };
    thread::scope(|scope| {
        for _ in 0..others {
            // Where there are no more threads, those that there are do its part.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}

fn copy_part(source: &[u8], target: &mut [u8]) {
    if source.len() < LARGE {
        target.copy_from_slice(source);
    } else {
        stream(source, target);
    }
}

#[cfg(target_arch = "x86_64")]
fn stream(source: &[u8], target: &mut [u8]) {
    use std::arch::x86_64::{
        __m128i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_sfence, _mm_stream_si128,
    };

    const LINE: usize = 64;
    const PAGE: usize = 4096;
    const STREAMS: usize = 4;
    const AHEAD: usize = 4 * LINE;

    // A line is written as a whole or not past the caches.
    let head = target.as_ptr().align_offset(LINE).min(target.len());
    let (first, target) = target.split_at_mut(head);
    let (before, source) = source.split_at(head);
    first.copy_from_slice(before);
    let mut froms = source.chunks_exact(STREAMS * PAGE);
    let mut intos = target.chunks_exact_mut(STREAMS * PAGE);
    for (from, into) in froms.by_ref().zip(intos.by_ref()) {
        let (from, into) = (from.as_ptr(), into.as_mut_ptr());
        for line in (0..PAGE).step_by(LINE) {
            for stream in 0..STREAMS {
                let start = stream * PAGE + line;
                // SAFETY: SSE2 is part of x86-64. `start` plus a line is inside the two chunks of
                // this round, and `into` is on a line, so each store is aligned. A prefetch follows
                // no address.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(start + AHEAD).cast());
                    for part in (start..start + LINE).step_by(size_of::<__m128i>()) {
                        let value = _mm_loadu_si128(from.add(part).cast());
                        _mm_stream_si128(into.add(part).cast(), value);
                    }
                }
            }
        }
    }
    // SAFETY: part of x86-64. Such stores may come behind later ones, that of a lock say: no more.
    unsafe { _mm_sfence() };
    intos.into_remainder().copy_from_slice(froms.remainder());
}

#[cfg(not(target_arch = "x86_64"))]
fn stream(source: &[u8], target: &mut [u8]) {
    target.copy_from_slice(source);
}
