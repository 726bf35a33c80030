// SPDX-License-Identifier: Apache-2.0
// Write a whole disk in random order, past all caches, and read it back.
//
//     whole_disk rewrite DISK   check what is there, then write all and read it back
//     whole_disk check DISK     only check
//     whole_disk sprinkle DISK  write a page here and there, and read nothing
//
// Every sector says which one it is, of how many, and in which round it was
// written, so that a later call, also from another boot or after the disk has
// grown, knows what has to be there. A disk that was never written is not
// checked. Runs in the guest on disks, and on the host on the image to boot.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SECTOR = 512, SMALL = 4096, LARGE = 262144, SPLIT = 32, SPARSE = 16777216, WORDS = SECTOR / 8 };

static const uint64_t MAGIC = 0x6b7369642d653265; // "e2e-disk"

struct sector { uint64_t magic, round, number, count, noise[WORDS - 4]; };

static const char *name;
static uint64_t state = 88172645463325252;
static char *buffer, *wanted;

static uint64_t next_random(void)
{
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return state;
}

static void stop(const char *what, uint64_t offset)
{
    printf("e2e: %s FAILED to %s at byte %llu: %s\n", name, what, (unsigned long long)offset, strerror(errno));
    exit(1);
}

// The noise is in the block already, and the same in each sector: making it
// anew each time would take longer than the writing does.
static void make(char *into, uint64_t offset, size_t length, uint64_t round, uint64_t size)
{
    for (size_t at = 0; at < length; at += SECTOR) {
        struct sector *sector = (struct sector *)(into + at);
        sector->magic = MAGIC;
        sector->round = round;
        sector->number = (offset + at) / SECTOR;
        sector->count = size / SECTOR;
    }
}

static void read_at(int disk, uint64_t offset, size_t length)
{
    ssize_t got = pread(disk, buffer, length, offset);
    if (got != (ssize_t)length)
        stop("read", offset);
}

// memcmp() would use instructions that QEMU is slow to emulate.
static int differ(const void *one, const void *other, size_t length)
{
    const uint64_t *a = one, *b = other;
    uint64_t difference = 0;
    for (size_t word = 0; word < length / 8; word++)
        difference |= a[word] ^ b[word];
    return difference != 0;
}

static void check(int disk, uint64_t size, uint64_t round)
{
    for (uint64_t offset = 0; offset < size; offset += LARGE) {
        size_t length = size - offset < LARGE ? size - offset : LARGE;
        read_at(disk, offset, length);
        make(wanted, offset, length, round, size);
        if (differ(buffer, wanted, length)) {
            errno = EILSEQ;
            stop("find what was written", offset);
        }
    }
    printf("e2e: %s reads back, %llu bytes of round %llu\n", name, (unsigned long long)size,
           (unsigned long long)round);
}

// One in SPLIT large blocks is written in small pieces; all in one random order.
static void write_all(int disk, uint64_t size, uint64_t round)
{
    uint64_t *offsets = malloc((size / SMALL + 1) * sizeof *offsets), count = 0, writes = 0;
    for (uint64_t block = 0; block * LARGE < size; block++)
        for (uint64_t piece = 0; piece < (block % SPLIT ? 1 : LARGE / SMALL); piece++)
            if (block * LARGE + piece * SMALL < size)
                offsets[count++] = block * LARGE + piece * SMALL;
    for (uint64_t left = count; left > 1; left--) {
        uint64_t other = next_random() % left, kept = offsets[other];
        offsets[other] = offsets[left - 1];
        offsets[left - 1] = kept;
    }
    for (; writes < count; writes++) {
        uint64_t offset = offsets[writes];
        size_t length = offset / LARGE % SPLIT ? LARGE : SMALL;
        if (length > size - offset)
            length = size - offset;
        make(wanted, offset, length, round, size);
        if (pwrite(disk, wanted, length, offset) != (ssize_t)length)
            stop("write", offset);
    }
    if (fsync(disk))
        stop("flush", size);
    printf("e2e: %s is written, %llu bytes in %llu writes\n", name, (unsigned long long)size,
           (unsigned long long)writes);
}

static void sprinkle(int disk, uint64_t size)
{
    uint64_t writes = 0;
    for (uint64_t offset = SPARSE - LARGE; offset + SMALL <= size; offset += SPARSE, writes++) {
        make(wanted, offset, SMALL, 0, size);
        if (pwrite(disk, wanted, SMALL, offset) != SMALL)
            stop("write", offset);
    }
    if (fsync(disk))
        stop("flush", size);
    printf("e2e: %s is sprinkled, %llu writes\n", name, (unsigned long long)writes);
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc != 3 || (strcmp(argv[1], "rewrite") && strcmp(argv[1], "check") && strcmp(argv[1], "sprinkle"))) {
        fprintf(stderr, "usage: whole_disk rewrite|check|sprinkle DISK\n");
        return 2;
    }
    name = argv[2];
    int rewrite = !strcmp(argv[1], "rewrite"), some = !strcmp(argv[1], "sprinkle");
    if (posix_memalign((void **)&buffer, SMALL, LARGE) || posix_memalign((void **)&wanted, SMALL, LARGE))
        stop("have memory", 0);
    for (size_t at = 0; at < LARGE; at += 8)
        *(uint64_t *)(wanted + at) = at < SECTOR ? next_random() : *(uint64_t *)(wanted + at - SECTOR);
    struct stat status;
    if (stat(name, &status))
        stop("look", 0);
    int disk = open(name, (rewrite || some ? O_RDWR : O_RDONLY) | (S_ISBLK(status.st_mode) ? O_DIRECT : 0));
    if (disk < 0)
        stop("open", 0);
    uint64_t size = lseek(disk, 0, SEEK_END), round = 0;
    if (some) {
        sprinkle(disk, size);
        return 0;
    }
    read_at(disk, 0, SECTOR);
    struct sector first = *(struct sector *)buffer;
    if (first.magic == MAGIC) {
        round = first.round;
        check(disk, first.count * SECTOR, round);
    } else if (!rewrite) {
        errno = ENODATA;
        stop("find anything", 0);
    }
    if (rewrite) {
        write_all(disk, size, round + 1);
        check(disk, size, round + 1);
    }
    return 0;
}
