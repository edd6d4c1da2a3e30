//! What somebody else has written into parameters, found by their bits.

use half::{bf16, f16};

use super::{BLOCK, Element};

/// A low precision that an fp32 master is published in.
pub trait Published: Element<Sum = f32> {
    /// The bits in the lower half.
    fn bits(self) -> u32;

    /// Bits of infinity; those of a NaN are above, but for the sign.
    const INFINITY: u32;

    /// The nearest value, ties to even: what a master that is not NaN is published as.
    fn publish(master: f32) -> u32;
}

const SIGN: u32 = 0x8000;

impl Published for bf16 {
    const INFINITY: u32 = 0x7f80;

    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }

    fn publish(master: f32) -> u32 {
        let bits = master.to_bits();
        bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16
    }
}

impl Published for f16 {
    const INFINITY: u32 = 0x7c00;

    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }

    // Written out with selects, as `widen` is, so that loops are vectorised. A result below the
    // normal numbers is rounded by an addition that moves its last bit to the last bit of the sum.
    fn publish(master: f32) -> u32 {
        const OVERFLOW: u32 = (127 + 16) << 23;
        const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
        const LAST_BIT: u32 = (127 - 15 + 23 - 10 + 1) << 23;
        let bits = master.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let subnormal = (f32::from_bits(magnitude) + f32::from_bits(LAST_BIT)).to_bits();
        let rebiased = magnitude.wrapping_sub((127 - 15) << 23);
        let normal = rebiased.wrapping_add(0xfff + ((magnitude >> 13) & 1)) >> 13;
        let kept = if magnitude >= OVERFLOW {
            <Self as Published>::INFINITY
        } else if magnitude < SMALLEST_NORMAL {
            subnormal.wrapping_sub(LAST_BIT)
        } else {
            normal
        };
        kept | ((bits >> 16) & SIGN)
    }
}

/// Whether `value` is what `master` was published as. A NaN is, where both are: which payload a
/// cast gives it differs among instructions.
fn is_published<E: Published>(value: E, master: f32) -> bool {
    if master.is_nan() {
        value.bits() & !SIGN > E::INFINITY
    } else {
        value.bits() == E::publish(master)
    }
}

/// Takes each element of `values` that is not what its master was published as into the master, and
/// leaves the others their bits; returns how many were taken.
///
/// # Panics
/// If the lengths differ.
pub fn take_writes<E: Published>(values: &[E], master: &mut [f32]) -> usize {
    assert_eq!(values.len(), master.len(), "one master for each element");
    let mut taken = 0;
    for (values, master) in values.chunks(BLOCK).zip(master.chunks_mut(BLOCK)) {
        if is_surely_published(values, master) {
            continue;
        }
        for (value, old) in values.iter().zip(master) {
            if !is_published(*value, *old) {
                *old = value.widen();
                taken += 1;
            }
        }
    }
    taken
}

/// True for nearly every block. It is read to its end, without the branches that would keep the
/// loop from being vectorised, so a NaN counts as a difference here.
fn is_surely_published<E: Published>(values: &[E], master: &[f32]) -> bool {
    let mut differences = 0;
    for (value, old) in values.iter().zip(master) {
        let nan = u32::from(old.to_bits() & 0x7fff_ffff > 0x7f80_0000);
        differences |= (value.bits() ^ E::publish(*old)) | nan;
    }
    differences == 0
}
