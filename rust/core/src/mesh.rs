//! Which ranks take part in a collective: named groups over explicit ranks.
//!
//! ```text
//! job      all ranks of the mesh
//! ├ replica  ranks that hold the same shards: copies of one model state
//! └ shard    ranks that hold different shards of it, listed in the order of the shards
//!    ├ inner   those of them that sit together, on one host
//!    └ outer   those that have the same place on different hosts
//! ```
//!
//! `shard` and `replica` say what ranks *hold*, `inner` and `outer` where they *sit*. Every rank is
//! in one group of each name. Two hosts of two ranks, with one model state over all four:
//!
//! | rank | host | place | shard | inner group | outer group |
//! |-----:|-----:|------:|------:|-------------|-------------|
//! |    0 |    0 |     0 |     0 | 0, 1        | 0, 2        |
//! |    1 |    0 |     1 |     2 | 0, 1        | 1, 3        |
//! |    2 |    1 |     0 |     1 | 2, 3        | 0, 2        |
//! |    3 |    1 |     1 |     3 | 2, 3        | 1, 3        |
//!
//! - **MSH-1** The groups of one name tile the ranks, and all of them are equal in size.
//! - **MSH-2** The job is shard × replica, and a shard group is inner × outer: a rank and its two
//!   places say each other.
//! - **MSH-3** Shards are numbered by (place on the host, host). So cutting a bucket among a host's
//!   ranks, and then each piece among the hosts, leaves every rank with the shard of its number.
//!
//! A mesh knows no process group, address or device: it says who belongs together, and whoever
//! communicates makes the connections.

use crate::error::PlanError;
use crate::ids::Rank;

/// The name of a group. Each rank is in one group of each name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// Ranks that hold different shards of one model state, in the order of the shards.
    Shard,
    /// Ranks that hold the same shards of different copies of the model state.
    Replica,
    /// Ranks of a shard group that sit together.
    Inner,
    /// Ranks of a shard group that have the same place on different hosts.
    Outer,
    /// All ranks, copy by copy of the model state.
    Job,
    /// The rank alone: nothing crosses a network.
    Own,
}

/// Who belongs together. See the [module](self) for its groups and invariants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// The ranks of each copy of the model state, by shard.
    replicas: Vec<Vec<Rank>>,
    hosts: u32,
    places: Vec<Place>,
}

/// Where a rank stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    replica: u32,
    shard: u32,
}

impl Mesh {
    /// One model state over `world` ranks that all sit together, shards in rank order.
    ///
    /// # Errors
    /// [`PlanError::BadWorld`] for a world of 0.
    pub fn flat(world: u32) -> Result<Self, PlanError> {
        Self::new(&[vec![(0..world).map(Rank).collect()]])
    }

    /// Copies of a model state, each over so many hosts, and ranks numbered by copy and shard, so
    /// that a rank of the first copy has the number of its shard.
    ///
    /// # Errors
    /// [`PlanError::BadWorld`] for a world of 0, [`PlanError::BadHosts`] unless copies and hosts
    /// share the ranks evenly.
    pub fn even(world: u32, replicas: u32, hosts: u32) -> Result<Self, PlanError> {
        if world == 0 {
            return Err(PlanError::BadWorld);
        }
        let parts = replicas.checked_mul(hosts).filter(|&parts| parts > 0);
        let places = parts.filter(|&parts| world.is_multiple_of(parts)).map(|parts| world / parts);
        let places = places.ok_or(PlanError::BadHosts { world, replicas, hosts })?;
        let copies = (0..replicas).map(|replica| {
            let first = replica * places * hosts;
            let host = |host| (0..places).map(move |place| Rank(first + place * hosts + host));
            (0..hosts).map(|each| host(each).collect()).collect()
        });
        Self::new(&copies.collect::<Vec<Vec<Vec<Rank>>>>())
    }

    /// Copies of a model state, each over hosts, each with its ranks.
    ///
    /// # Errors
    /// [`PlanError::BadWorld`] without a rank, [`PlanError::UnevenMesh`] unless copies have equally
    /// many hosts and hosts equally many ranks, [`PlanError::RankNotOnce`] unless the ranks are
    /// those from 0 on, each listed once.
    pub fn new(replicas: &[Vec<Vec<Rank>>]) -> Result<Self, PlanError> {
        let hosts = replicas.first().map_or(0, Vec::len);
        let inner = replicas.first().and_then(|hosts| hosts.first()).map_or(0, Vec::len);
        let listed = || replicas.iter().flatten().flatten();
        if listed().next().is_none() {
            return Err(PlanError::BadWorld);
        }
        let even = |copy: &Vec<Vec<Rank>>| {
            copy.len() == hosts && copy.iter().all(|host| host.len() == inner)
        };
        if !replicas.iter().all(even) {
            return Err(PlanError::UnevenMesh { hosts, inner });
        }
        let world = listed().count();
        let unset = Place { replica: u32::MAX, shard: u32::MAX };
        let mut places = vec![unset; world];
        let mut by_shard = Vec::with_capacity(replicas.len());
        for (replica, copy) in (0..).zip(replicas) {
            let ordered = (0..inner).flat_map(|place| copy.iter().map(move |host| host[place]));
            let ranks: Vec<Rank> = ordered.collect();
            for (shard, &rank) in (0..).zip(&ranks) {
                let free = places.get_mut(rank.index()).filter(|place| **place == unset);
                *free.ok_or(PlanError::RankNotOnce { rank })? = Place { replica, shard };
            }
            by_shard.push(ranks);
        }
        Ok(Self { replicas: by_shard, hosts: hosts as u32, places })
    }

    /// Number of ranks.
    pub fn world(&self) -> u32 {
        self.places.len() as u32
    }

    /// How many ranks a group of this name has.
    pub fn size(&self, group: Group) -> u32 {
        let shards = self.replicas[0].len() as u32;
        match group {
            Group::Shard => shards,
            Group::Replica => self.replicas.len() as u32,
            Group::Inner => shards / self.hosts,
            Group::Outer => self.hosts,
            Group::Job => self.world(),
            Group::Own => 1,
        }
    }

    /// `rank`'s group of this name, `rank` among them, in the order in which its collectives count
    /// their ranks and take their sums.
    ///
    /// # Errors
    /// [`PlanError::UnknownRank`].
    pub fn members(&self, group: Group, rank: Rank) -> Result<Vec<Rank>, PlanError> {
        let Place { replica, shard } = self.place(rank)?;
        let copy = &self.replicas[replica as usize];
        let (hosts, shard) = (self.hosts as usize, shard as usize);
        Ok(match group {
            Group::Shard => copy.clone(),
            Group::Replica => self.replicas.iter().map(|copy| copy[shard]).collect(),
            Group::Inner => copy.iter().skip(shard % hosts).step_by(hosts).copied().collect(),
            Group::Outer => copy[shard - shard % hosts..][..hosts].to_vec(),
            Group::Job => self.replicas.concat(),
            Group::Own => vec![rank],
        })
    }

    /// `rank`'s place in its group of this name, from 0; in its shard group this is the number of
    /// its shard.
    ///
    /// # Errors
    /// [`PlanError::UnknownRank`].
    pub fn position(&self, group: Group, rank: Rank) -> Result<u32, PlanError> {
        let Place { replica, shard } = self.place(rank)?;
        Ok(match group {
            Group::Shard => shard,
            Group::Replica => replica,
            Group::Inner => shard / self.hosts,
            Group::Outer => shard % self.hosts,
            Group::Job => replica * self.size(Group::Shard) + shard,
            Group::Own => 0,
        })
    }

    /// All ranks: copy by copy of the model state, by shard.
    pub fn ranks(&self) -> impl Iterator<Item = Rank> + '_ {
        self.replicas.iter().flatten().copied()
    }

    /// The rank that holds shard `shard` of the first copy of the model state, which is the one
    /// that is saved.
    ///
    /// # Panics
    /// Beyond the last shard.
    pub fn holder(&self, shard: u32) -> Rank {
        self.replicas[0][shard as usize]
    }

    fn place(&self, rank: Rank) -> Result<Place, PlanError> {
        let world = self.world();
        self.places.get(rank.index()).copied().ok_or(PlanError::UnknownRank { rank, world })
    }
}
