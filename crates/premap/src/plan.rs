//! What is to be mapped, in which order, cut into chunks.
//!
//! The order of the regions is the caller's and is kept: a working set first, then the rest. A page may be named twice;
//! the second time finds it present. Chunks end on 2 MiB boundaries where the region allows, so that a huge page is never
//! cut, and hugetlb regions are cut on their own page size.

use premap_address::{GpaRange, Hva, PAGE_SIZE, PageSize};

use crate::forgotten::Moment;
use crate::memory::{Backing, Region, Touch};

/// The default size of a chunk.
///
/// KVM holds SRCU for a whole pre-fault call and so stalls slot updates for as long as a chunk takes; 16 MiB keeps that
/// to some milliseconds while the cost of a call stays far below that of the pages.
pub const DEFAULT_CHUNK: u64 = 16 << 20;

/// The default size of a chunk where the guest runs meanwhile: nothing that it waits for takes longer than one chunk.
pub const BACKGROUND_CHUNK: u64 = 2 << 20;

/// An ordered list of guest memory to be mapped, as it is when the plan is made: what is
/// [forgotten](crate::SlotGuard::forget) afterwards is left out whenever the plan is run.
#[derive(Clone, Debug)]
pub struct Plan {
    regions: Vec<Region>,
    bytes: u64,
    chunk: Option<u64>,
    made: Moment,
}

/// Why a plan can't be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The host address is not on a boundary of the backing's page size.
    #[error(
        "host address {host} of the region at gpa {range} is not {unit:#x}-aligned, the page size of its backing"
    )]
    UnalignedHost {
        /// The region's guest range.
        range: GpaRange,
        /// Its host address.
        host: Hva,
        /// The backing's page size in bytes.
        unit: u64,
    },
    /// A hugetlb region does not start or end on a boundary of its page size.
    #[error("the region at gpa {range} starts or ends inside a page of its backing; page size {unit:#x}")]
    CutsPage {
        /// The region's guest range.
        range: GpaRange,
        /// The backing's page size in bytes.
        unit: u64,
    },
    /// The region reaches beyond the end of the host's address space.
    #[error("the region at gpa {range} reaches beyond 2^64 on the host from {host}")]
    HostWraps {
        /// The region's guest range.
        range: GpaRange,
        /// Its host address.
        host: Hva,
    },
    /// The regions are more than can be counted.
    #[error("with the region at gpa {range} the plan is 2^64 bytes or more; name each region once")]
    TooLarge {
        /// The first region that is too much.
        range: GpaRange,
    },
    /// The size of a chunk is zero or no multiple of 4 KiB.
    #[error("a chunk of {0} bytes is not a multiple of 4 KiB above zero; 2 MiB to 64 MiB serve well")]
    BadChunk(u64),
}

impl Plan {
    /// Makes a plan from regions in the order in which they are to be mapped.
    ///
    /// # Errors
    /// A region whose host side is unaligned or wraps (its guest side is right by construction), or 2^64 bytes in all.
    pub fn new(regions: impl IntoIterator<Item = Region>) -> Result<Self, PlanError> {
        let made = Moment::of_new_plan();
        let regions: Vec<_> = regions.into_iter().map(check).collect::<Result<_, _>>()?;
        let mut bytes = 0_u64;
        for Region { range, .. } in &regions {
            bytes = bytes.checked_add(range.bytes()).ok_or(PlanError::TooLarge { range: *range })?;
        }
        Ok(Self { regions, bytes, chunk: None, made })
    }

    /// Sets the size of a chunk in bytes: [`DEFAULT_CHUNK`] unless set, or [`BACKGROUND_CHUNK`] in a background run.
    ///
    /// # Errors
    /// Zero, or no multiple of 4 KiB.
    pub fn with_chunk(mut self, bytes: u64) -> Result<Self, PlanError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(PlanError::BadChunk(bytes));
        }
        self.chunk = Some(bytes);
        Ok(self)
    }

    /// The regions in order.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// All bytes of the plan; a page named twice counts twice.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// When the plan was made.
    pub(crate) fn moment(&self) -> Moment {
        self.made
    }

    /// The plan's regions as pieces, in order.
    pub(crate) fn pieces(&self) -> Vec<Piece> {
        (0..).zip(&self.regions).map(|(place, region)| Piece { place, region: *region }).collect()
    }

    /// How large a chunk is: `default` bytes unless the caller chose a size.
    pub(crate) fn chunk_bytes(&self, default: u64) -> u64 {
        self.chunk.unwrap_or(default)
    }
}

/// What a run is to map of one region of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The region's place in the plan.
    pub(crate) place: u64,
    pub(crate) region: Region,
}

fn check(region: Region) -> Result<Region, PlanError> {
    let Region { range, host, backing, .. } = region;
    let unit = backing.unit();
    if host.raw() % unit != 0 {
        return Err(PlanError::UnalignedHost { range, host, unit });
    }
    if range.start().raw() % unit != 0 || range.bytes() % unit != 0 {
        return Err(PlanError::CutsPage { range, unit });
    }
    match host.checked_add(range.bytes()) {
        Some(_) => Ok(region),
        None => Err(PlanError::HostWraps { range, host }),
    }
}

/// A part of one region, small enough for one call, unless it is what is left of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) range: GpaRange,
    pub(crate) host: Hva,
    pub(crate) backing: Backing,
    pub(crate) touch: Touch,
}

impl Chunk {
    pub(crate) const fn whole(Region { range, host, backing, touch }: Region) -> Self {
        Self { range, host, backing, touch }
    }

    /// Cuts off the first `bytes` or a little less, so that the cut lies on a boundary that keeps pages whole.
    pub(crate) fn cut(self, bytes: u64) -> (Self, Option<Self>) {
        let unit = self.backing.unit().max(PAGE_SIZE);
        let wanted = bytes.max(unit);
        let target = self.range.start().raw().saturating_add(wanted);
        let start = self.range.start().raw();
        let aligned_to = |size: u64| (target / size * size).checked_sub(start).filter(|head| *head > 0);
        let huge = unit.max(PageSize::Size2M.bytes());
        let head = aligned_to(huge).or_else(|| aligned_to(unit)).unwrap_or(unit);
        self.split_at(head).map_or((self, None), |(head, tail)| (head, Some(tail)))
    }

    /// The chunk in two halves that keep pages whole, or `None` for a single page.
    pub(crate) fn halves(self) -> Option<(Self, Self)> {
        let unit = self.backing.unit();
        self.split_at(self.range.bytes() / unit / 2 * unit)
    }

    /// The longest front of at most `bytes` that keeps pages whole, and what lies behind it.
    pub(crate) fn limit(self, bytes: u64) -> (Option<Self>, Option<Self>) {
        let unit = self.backing.unit();
        match self.split_at(bytes / unit * unit) {
            Some((head, tail)) => (Some(head), Some(tail)),
            None if bytes >= self.range.bytes() => (Some(self), None),
            None => (None, Some(self)),
        }
    }

    /// The chunk in two, `bytes` after its start, or `None` where that is not inside it.
    pub(crate) fn split_at(self, bytes: u64) -> Option<(Self, Self)> {
        let (head, tail) = self.range.split_at(bytes)?;
        let host = self.host.checked_add(bytes)?;
        Some((Self { range: head, ..self }, Self { range: tail, host, ..self }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use premap_address::Gpa;

    const MIB: u64 = 1 << 20;

    fn region(gpa: u64, bytes: u64, backing: Backing) -> Region {
        let range = GpaRange::new(Gpa::new(gpa), bytes);
        Region { range, host: Hva::new(0x7f00_0000_0000 + gpa), backing, touch: Touch::Write }
    }

    #[track_caller]
    fn check_cuts(regions: &[Region], chunk: u64, expected: &[(u64, u64)]) {
        let plan = Plan::new(regions.iter().copied()).unwrap().with_chunk(chunk).unwrap();
        let mut cuts = Vec::new();
        for piece in plan.pieces() {
            let mut rest = Some(Chunk::whole(piece.region));
            while let Some(whole) = rest {
                let (chunk, after) = whole.cut(plan.chunk_bytes(DEFAULT_CHUNK));
                assert_eq!(chunk.host.raw() - chunk.range.start().raw(), 0x7f00_0000_0000);
                cuts.push((chunk.range.start().raw(), chunk.range.bytes()));
                rest = after;
            }
        }
        assert_eq!(cuts, expected);
    }

    #[test]
    fn chunks_end_on_2m_boundaries_where_the_region_allows() {
        let unaligned = region(MIB, 9 * MIB, Backing::Anonymous);
        check_cuts(&[unaligned], 4 * MIB, &[(MIB, 3 * MIB), (4 * MIB, 4 * MIB), (8 * MIB, 2 * MIB)]);
        let small = region(0x5000, 0x3000, Backing::Anonymous);
        check_cuts(&[small], 0x1000, &[(0x5000, 0x1000), (0x6000, 0x1000), (0x7000, 0x1000)]);
    }

    #[test]
    fn the_callers_order_is_kept() {
        let regions = [region(8 * MIB, MIB, Backing::Anonymous), region(0, MIB, Backing::Shared)];
        check_cuts(&regions, 16 * MIB, &[(8 * MIB, MIB), (0, MIB)]);
    }

    #[test]
    fn hugetlb_is_cut_on_its_own_pages() {
        let gigantic = region(1 << 30, 2 << 30, Backing::Hugetlb(PageSize::Size1G));
        check_cuts(&[gigantic], 16 * MIB, &[(1 << 30, 1 << 30), (2 << 30, 1 << 30)]);
    }

    #[test]
    fn bad_regions_are_refused_with_their_values() {
        let huge = Backing::Hugetlb(PageSize::Size2M);
        let refused = |region| Plan::new([region]).unwrap_err();
        assert!(matches!(refused(region(0, MIB, huge)), PlanError::CutsPage { unit: 0x20_0000, .. }));
        let host = Hva::new(0x1001);
        let unaligned = Region { host, ..region(0, MIB, Backing::Anonymous) };
        assert!(matches!(refused(unaligned), PlanError::UnalignedHost { unit: 0x1000, .. }));
        let wraps = Region { host: Hva::new(!0xfff), ..region(0, MIB, Backing::Anonymous) };
        assert!(matches!(refused(wraps), PlanError::HostWraps { .. }));
        let half = Region { host: Hva::new(0), ..region(0, 1 << 63, Backing::Anonymous) };
        assert!(matches!(Plan::new([half, half]), Err(PlanError::TooLarge { range }) if range == half.range));
        assert_eq!(Plan::new([half]).unwrap().bytes(), 1 << 63);
        assert_eq!(Plan::new([]).unwrap().with_chunk(3).unwrap_err(), PlanError::BadChunk(3));
        assert_eq!(Plan::new([]).unwrap().with_chunk(0).unwrap_err(), PlanError::BadChunk(0));
    }
}
