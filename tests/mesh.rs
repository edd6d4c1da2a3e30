//! The groups of a mesh.

mod arbitrary;

use arbitrary::{copies, mesh};
use proptest::prelude::*;
use zerort_core::{Group, Mesh, PlanError, Rank};

const GROUPS: [Group; 6] =
    [Group::Shard, Group::Replica, Group::Inner, Group::Outer, Group::Job, Group::Own];

fn ranks(ids: &[u32]) -> Vec<Rank> {
    ids.iter().copied().map(Rank).collect()
}

fn everybody(mesh: &Mesh) -> impl Iterator<Item = Rank> + use<> {
    (0..mesh.world()).map(Rank)
}

proptest! {
    #[test]
    fn msh_1_the_groups_of_a_name_tile_the_ranks_and_are_equal_in_size(mesh in mesh()) {
        for group in GROUPS {
            for rank in everybody(&mesh) {
                let members = mesh.members(group, rank).unwrap();
                prop_assert_eq!(members.len(), mesh.size(group) as usize);
                let place = mesh.position(group, rank).unwrap();
                prop_assert_eq!(members[place as usize], rank);
                for &member in &members {
                    prop_assert_eq!(&mesh.members(group, member).unwrap(), &members);
                }
            }
        }
    }

    #[test]
    fn msh_2_two_places_say_which_rank_it_is(mesh in mesh()) {
        let size = |group| mesh.size(group);
        prop_assert_eq!(size(Group::Shard) * size(Group::Replica), size(Group::Job));
        prop_assert_eq!(size(Group::Inner) * size(Group::Outer), size(Group::Shard));
        for [one, other] in [[Group::Shard, Group::Replica], [Group::Inner, Group::Outer]] {
            for rank in everybody(&mesh) {
                let crossing = mesh.members(other, rank).unwrap();
                let mine = mesh.members(one, rank).unwrap();
                prop_assert!(mine.iter().all(|peer| !crossing.contains(peer) || *peer == rank));
            }
        }
    }

    #[test]
    fn msh_3_shards_are_numbered_by_place_on_the_host_and_host(mesh in mesh()) {
        for rank in everybody(&mesh) {
            let place = |group| mesh.position(group, rank).unwrap();
            let shard = place(Group::Inner) * mesh.size(Group::Outer) + place(Group::Outer);
            prop_assert_eq!(place(Group::Shard), shard);
            let replicas = mesh.members(Group::Replica, rank).unwrap();
            prop_assert_eq!(mesh.holder(shard), replicas[0]);
        }
    }
}

proptest! {
    #[test]
    fn an_inner_group_is_a_host_as_it_was_given(copies in copies()) {
        let mesh = Mesh::new(&copies).unwrap();
        for (number, copy) in (0..).zip(&copies) {
            for (host, &rank) in copy.iter().flat_map(|host| host.iter().map(move |at| (host, at))) {
                prop_assert_eq!(&mesh.members(Group::Inner, rank).unwrap(), host);
                prop_assert_eq!(mesh.position(Group::Replica, rank), Ok(number));
            }
        }
    }
}

#[test]
fn a_flat_mesh_has_a_shard_for_each_rank_in_rank_order() {
    let mesh = Mesh::flat(3).unwrap();
    let of_rank_1 = GROUPS.map(|group| mesh.members(group, Rank(1)).unwrap());
    let (all, own) = (ranks(&[0, 1, 2]), ranks(&[1]));
    assert_eq!(of_rank_1, [all.clone(), own.clone(), all.clone(), own.clone(), all, own]);
    assert_eq!(mesh.ranks().collect::<Vec<_>>(), ranks(&[0, 1, 2]));
}

#[test]
fn two_copies_over_two_hosts_each_are_the_table_of_the_docs_twice() {
    let host = |first| ranks(&[first, first + 1]);
    let mesh = Mesh::new(&[vec![host(0), host(2)], vec![host(4), host(6)]]).unwrap();
    let of_rank_6 = GROUPS.map(|group| mesh.members(group, Rank(6)).unwrap());
    let expected = [
        ranks(&[4, 6, 5, 7]),
        ranks(&[2, 6]),
        ranks(&[6, 7]),
        ranks(&[4, 6]),
        ranks(&[0, 2, 1, 3, 4, 6, 5, 7]),
        ranks(&[6]),
    ];
    assert_eq!(of_rank_6, expected);
}

#[test]
fn a_mesh_without_sense_is_refused() {
    let refused = |copies: &[Vec<Vec<Rank>>]| Mesh::new(copies).unwrap_err();
    assert_eq!(Mesh::flat(0), Err(PlanError::BadWorld));
    assert_eq!(refused(&[]), PlanError::BadWorld);
    assert_eq!(refused(&[vec![]]), PlanError::BadWorld);
    let uneven = PlanError::UnevenMesh { hosts: 1, inner: 2 };
    assert_eq!(refused(&[vec![ranks(&[0, 1])], vec![ranks(&[2])]]), uneven);
    assert_eq!(refused(&[vec![ranks(&[0, 1])], vec![]]), uneven);
    let twice = |rank| PlanError::RankNotOnce { rank: Rank(rank) };
    assert_eq!(refused(&[vec![ranks(&[0, 1, 0])]]), twice(0));
    assert_eq!(refused(&[vec![ranks(&[0, 2])]]), twice(2));
}

#[test]
fn a_rank_beyond_the_world_is_in_no_group() {
    let mesh = Mesh::flat(2).unwrap();
    let unknown = PlanError::UnknownRank { rank: Rank(2), world: 2 };
    for group in GROUPS {
        assert_eq!(mesh.members(group, Rank(2)), Err(unknown));
        assert_eq!(mesh.position(group, Rank(2)), Err(unknown));
    }
}
