/* Does what a processor without AVX-VNNI cannot: a SIGILL handler for the dots of that extension.

   An instruction is VEX-encoded, always in three bytes (Intel SDM, volume 2, 2.3 and VPDPBUSD):
       C4 | ~R ~X ~B map | W ~vvvv L pp | 50-53 | ModRM | SIB | displacement
   with map 2 (0F38), W 0, pp 1 (66). Registers are in the signal's frame as XSAVE lays them out
   (volume 1, 13.4): xmm in the legacy area, what lies above them where CPUID 0xD says.
   Anything else goes to the handler that was there before. */

#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

enum { XMM = 160, SOFTWARE = 464, XSTATE_BV = 512 }; /* offsets in the area */
enum { SSE = 1, AVX = 2, UPPER_ZMM = 6 };            /* its components */
#define FRAME_MAGIC 0x46505853u                      /* FP_XSTATE_MAGIC1 of Linux */

static const int GENERAL[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};
static uint32_t offsets[UPPER_ZMM + 1];
static struct sigaction before;
static uint64_t num_handled;

struct dot { /* one instruction */
    int opcode, target, first, second;
    int size;                /* of a register in bytes */
    const uint8_t *memory;   /* in place of `second`, if there is any */
    int length;              /* bytes of the encoding; 0: not one of ours */
};

static const uint8_t *effective_address(const greg_t *general, const uint8_t **at, int mode,
                                        int base, int index_high, int base_high) {
    const uint8_t *p = *at;
    uint64_t address = 0;
    int32_t displacement = 0;
    int is_relative = 0, has_32_bits = mode == 2;
    if (base == 4) { /* a SIB byte */
        int sib = *p++, index = (sib >> 3 & 7) | index_high;
        base = sib & 7;
        if (index != 4) address += (uint64_t)general[GENERAL[index]] << (sib >> 6);
        if (base == 5 && mode == 0) has_32_bits = 1;
        else address += general[GENERAL[base | base_high]];
    } else if (base == 5 && mode == 0) {
        has_32_bits = is_relative = 1;
    } else {
        address += general[GENERAL[base | base_high]];
    }
    if (has_32_bits) memcpy(&displacement, p, 4), p += 4;
    else if (mode == 1) displacement = *(const int8_t *)p++;
    if (is_relative) address += (uint64_t)p; /* of the next instruction: no operand follows */
    *at = p;
    return (const uint8_t *)(address + displacement);
}

static struct dot decode(const greg_t *general) {
    const uint8_t *start = (const uint8_t *)general[REG_RIP], *p = start + 5;
    struct dot dot = {0};
    if (start[0] != 0xC4 || (start[1] & 31) != 2 || (start[2] & 0x83) != 1) return dot;
    if (start[3] < 0x50 || start[3] > 0x53) return dot;
    int right = start[1] & 128 ? 0 : 8, index = start[1] & 64 ? 0 : 8, base = start[1] & 32 ? 0 : 8;
    int mode = start[4] >> 6;
    dot.opcode = start[3];
    dot.target = (start[4] >> 3 & 7) | right;
    dot.first = ~start[2] >> 3 & 15;
    dot.size = start[2] & 4 ? 32 : 16;
    if (mode == 3) dot.second = (start[4] & 7) | base;
    else dot.memory = effective_address(general, &p, mode, start[4] & 7, index, base);
    dot.length = p - start;
    return dot;
}

static int32_t dot_of(int opcode, int32_t sum, const uint8_t *first, const uint8_t *second) {
    int64_t total = sum;
    int16_t words[2][2];
    memcpy(words[0], first, 4), memcpy(words[1], second, 4);
    if (opcode < 0x52)
        for (int i = 0; i < 4; i++) total += first[i] * (int8_t)second[i];
    else
        for (int i = 0; i < 2; i++) total += (int64_t)words[0][i] * words[1][i];
    if (opcode & 1) /* saturates */
        total = total > INT32_MAX ? INT32_MAX : total < INT32_MIN ? INT32_MIN : total;
    return (int32_t)(uint32_t)total;
}

/* A component that XSTATE_BV leaves out is in its initial state, zero, whatever the area holds. */
static void make_present(uint8_t *area, int component, uint32_t offset, int size) {
    uint64_t present;
    memcpy(&present, area + XSTATE_BV, 8);
    if (present >> component & 1) return;
    memset(area + offset, 0, size);
    present |= (uint64_t)1 << component;
    memcpy(area + XSTATE_BV, &present, 8);
}

static void read_register(const uint8_t *area, int number, uint8_t bytes[32]) {
    memcpy(bytes, area + XMM + 16 * number, 16);
    memcpy(bytes + 16, area + offsets[AVX] + 16 * number, 16);
}

static void run(uint8_t *area, const struct dot *dot) {
    uint8_t target[32], first[32], second[32];
    uint64_t features;
    memcpy(&features, area + SOFTWARE + 8, 8);
    make_present(area, SSE, XMM, 256);
    make_present(area, AVX, offsets[AVX], 256);
    read_register(area, dot->target, target);
    read_register(area, dot->first, first);
    if (dot->memory) memcpy(second, dot->memory, dot->size);
    else read_register(area, dot->second, second);
    for (int i = 0; i < dot->size; i += 4) {
        int32_t sum;
        memcpy(&sum, target + i, 4);
        sum = dot_of(dot->opcode, sum, first + i, second + i);
        memcpy(target + i, &sum, 4);
    }
    memset(target + dot->size, 0, 32 - dot->size); /* VEX clears all above its width */
    memcpy(area + XMM + 16 * dot->target, target, 16);
    memcpy(area + offsets[AVX] + 16 * dot->target, target + 16, 16);
    if (features >> UPPER_ZMM & 1) memset(area + offsets[UPPER_ZMM] + 32 * dot->target, 0, 32);
}

static void handle(int signal, siginfo_t *info, void *context) {
    mcontext_t *machine = &((ucontext_t *)context)->uc_mcontext;
    uint8_t *area = (uint8_t *)machine->fpregs;
    struct dot dot = decode(machine->gregs);
    uint32_t magic;
    (void)info;
    memcpy(&magic, area + SOFTWARE, 4);
    if (!dot.length || magic != FRAME_MAGIC) {
        sigaction(signal, &before, 0); /* the instruction runs again, into the old handler */
        return;
    }
    run(area, &dot);
    machine->gregs[REG_RIP] += dot.length;
    __atomic_fetch_add(&num_handled, 1, __ATOMIC_RELAXED);
}

/* 0, or -1 if the system refuses. */
int install(void) {
    struct sigaction action = {0};
    for (int component = AVX; component <= UPPER_ZMM; component++) {
        uint32_t size, unused, flags;
        __cpuid_count(0xD, component, size, offsets[component], flags, unused);
    }
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return sigaction(SIGILL, &action, &before);
}

uint64_t handled(void) { return num_handled; }
