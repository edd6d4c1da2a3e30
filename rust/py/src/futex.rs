//! Sleeping until another process has changed a number.
//!
//! A futex of Linux is a word of shared memory: [`sleep`] ends when the word is no longer what the
//! caller saw, and [`wake`] ends the sleep of whoever does so on that word, in any process that maps
//! it. Elsewhere a sleep is a short one, and nobody is woken.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Sleeps while `word` is `seen`, at most for `limit`; may end earlier for no reason.
#[cfg(target_os = "linux")]
pub fn sleep(word: &AtomicU32, seen: u32, limit: Duration) {
    let limit = libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    // SAFETY: the word lives for the call, aligned; the kernel only reads it and the limit.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &raw const limit);
    }
}

/// Wakes all who sleep on `word`.
#[cfg(target_os = "linux")]
pub fn wake(word: &AtomicU32) {
    // SAFETY: the address is compared, and nothing behind it is touched.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}

/// Sleeps a moment.
#[cfg(not(target_os = "linux"))]
pub fn sleep(_: &AtomicU32, _: u32, limit: Duration) {
    std::thread::sleep(limit.min(Duration::from_micros(200)));
}

/// Nobody sleeps long.
#[cfg(not(target_os = "linux"))]
pub fn wake(_: &AtomicU32) {}
