/* Asks a CoAP server on loopback as fast as it answers, and prints what came back, as JSON.
 *
 * Usage: load [-b SZX] [-n] [-w WINDOW] [-s SOCKETS] [-t SECONDS] [-c COUNT] [-r TIMEOUT_MS]
 *             HOST PORT FILE
 *
 * FILE has one request per line: its option bytes in hexadecimal digits; they are sent in rotation.
 *   -b  block by block: each request is followed by those for its further blocks
 *   -n  non-confirmable
 *   -w  requests in flight (with -b: transfers), over -s sockets, each of a port of its own
 *   -t  ends after this many seconds, with -c after this many requests, or on SIGTERM
 *   -r  repeats a confirmable request after this time, doubled each time; the fourth time it counts
 *       as lost; a non-confirmable one is lost after this time
 *
 * Bounded: at most 60 seconds and what is in flight then, 2^24 requests, 4,096 in flight,
 * 256 sockets, 65,536 lines of at most 1,024 bytes of options.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CON, NON, ACK, RST, BLOCK2 = 23 };
enum { MOST_REQUESTS = 1 << 24, MOST_SECONDS = 60, MOST_WINDOW = 4096, MOST_SOCKETS = 256 };
enum { MOST_LINES = 1 << 16, MOST_OPTIONS = 1024, DATAGRAM = 2048, BATCH = 64, ATTEMPTS = 4 };
enum { SLICES_PER_S = 100, MOST_SLICES = 24000 };
#define NS UINT64_C(1000000000)
#define LOOK_NS (NS / 100) /* between two looks for what timed out */

struct request {
    uint8_t options[MOST_OPTIONS];
    size_t size;
    unsigned last; /* number of the last option */
};

struct peer { /* a socket, and what is to be sent by it */
    int fd;
    uint16_t message_id;
    unsigned waiting;
    struct mmsghdr headers[BATCH];
    struct iovec parts[BATCH];
};

struct slot { /* one of the window */
    struct peer *peer;
    const struct request *request;
    bool busy;
    uint16_t message_id;
    uint32_t token, block;
    unsigned attempts;
    unsigned long answers;
    uint64_t sent, deadline;
    size_t got, size; /* bytes: of the payload so far, of the datagram */
    uint8_t datagram[8 + MOST_OPTIONS + 8];
};

static struct {
    bool blockwise, non;
    unsigned window, sockets, szx;
    uint64_t duration, timeout;
    unsigned long count;
} asked = {.window = 1, .sockets = 1, .duration = NS, .timeout = NS / 2, .count = MOST_REQUESTS};

static struct {
    unsigned long requests, answers, lost, retransmissions, resets, strays, transfers, codes[256];
    size_t payload;
    unsigned slices[MOST_SLICES];
} counted;

static struct request requests[MOST_LINES];
static size_t lines, next_line;
static struct peer peers[MOST_SOCKETS];
static struct slot slots[MOST_WINDOW];
static float latencies_us[MOST_REQUESTS];
static uint32_t multiplier, inverse; /* of each other: make tokens look random, and find back */
static uint64_t start, end, last_answer;
static volatile sig_atomic_t stopped;
static unsigned in_flight;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS + (uint64_t)now.tv_nsec;
}

/* ---- Options --------------------------------------------------------------------------------- */

struct option {
    unsigned number;
    const uint8_t *value;
    size_t size;
};

static bool extended(unsigned nibble, const uint8_t **at, const uint8_t *stop, size_t *value)
{
    int more = nibble < 13 ? 0 : (int)nibble - 12;
    if (nibble == 15 || stop - *at < more)
        return false;
    *value = more == 0 ? nibble : more == 1 ? **at + 13u : (*at)[0] * 256u + (*at)[1] + 269u;
    *at += more;
    return true;
}

/* Reads one option. Returns 1; 0 at the end, `at` is where the payload begins; -1: malformed. */
static int read_option(const uint8_t **at, const uint8_t *stop, struct option *option)
{
    if (*at == stop)
        return 0;
    uint8_t head = *(*at)++;
    if (head == 0xff)
        return *at == stop ? -1 : 0;
    size_t delta;
    if (!extended(head >> 4, at, stop, &delta) || !extended(head & 15, at, stop, &option->size)
        || (size_t)(stop - *at) < option->size)
        return -1;
    option->number += (unsigned)delta;
    option->value = *at;
    *at += option->size;
    return 1;
}

/* Appends Block2 to options of which the last has a lower number. */
static uint8_t *append_block(uint8_t *to, unsigned last, uint32_t number)
{
    uint8_t *at = to + 1;
    unsigned delta = BLOCK2 - last;
    if (delta >= 13)
        *at++ = (uint8_t)(delta - 13);
    const uint8_t *value = at;
    for (int shift = 16; shift >= 0; shift -= 8)
        if ((number << 4 | asked.szx) >> shift)
            *at++ = (uint8_t)((number << 4 | asked.szx) >> shift);
    *to = (uint8_t)((delta < 13 ? delta : 13) << 4 | (unsigned)(at - value));
    return at;
}

static bool read_request(const char *line, size_t digits, struct request *request)
{
    if (digits % 2 || strspn(line, "0123456789abcdefABCDEF") != digits)
        return false;
    request->size = digits / 2;
    for (size_t i = 0; i < request->size; i++)
        sscanf(line + 2 * i, "%2hhx", &request->options[i]);
    struct option option = {0};
    const uint8_t *at = request->options, *stop = at + request->size;
    int more;
    while ((more = read_option(&at, stop, &option)) > 0)
        ;
    request->last = option.number;
    return more == 0 && at == stop && (!asked.blockwise || option.number < BLOCK2);
}

static void read_requests(const char *path)
{
    FILE *file = fopen(path, "r");
    if (!file)
        err(1, "%s", path);
    char line[2 * MOST_OPTIONS + 2];
    for (; fgets(line, sizeof line, file); lines++) {
        size_t digits = strcspn(line, "\n");
        if (lines == MOST_LINES || line[digits] != '\n'
            || !read_request(line, digits, &requests[lines]))
            errx(1, "%s:%zu: must be options in hexadecimal digits, of at most %d bytes%s", path,
                 lines + 1, MOST_OPTIONS, asked.blockwise ? ", that Block2 can follow" : "");
    }
    fclose(file);
    if (!lines)
        errx(1, "%s: no requests", path);
}

/* ---- Sockets --------------------------------------------------------------------------------- */

static void open_peers(const char *host, unsigned port)
{
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    bool is_v4 = inet_pton(AF_INET, host, &v4.sin_addr) == 1;
    bool is_v6 = !is_v4 && inet_pton(AF_INET6, host, &v6.sin6_addr) == 1;
    if (!(is_v4 && ntohl(v4.sin_addr.s_addr) >> 24 == 127)
        && !(is_v6 && IN6_IS_ADDR_LOOPBACK(&v6.sin6_addr)))
        errx(1, "%s: not an address of loopback", host);
    for (struct peer *peer = peers; peer < peers + asked.sockets; peer++) {
        peer->fd = socket(is_v4 ? AF_INET : AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        if (peer->fd < 0
            || connect(peer->fd, is_v4 ? (struct sockaddr *)&v4 : (struct sockaddr *)&v6,
                       is_v4 ? sizeof v4 : sizeof v6))
            err(1, "%s", host);
        setsockopt(peer->fd, SOL_SOCKET, SO_RCVBUF, &(int){1 << 22}, sizeof(int));
        peer->message_id = (uint16_t)random();
        for (unsigned i = 0; i < BATCH; i++)
            peer->headers[i].msg_hdr
                = (struct msghdr){.msg_iov = &peer->parts[i], .msg_iovlen = 1};
    }
}

static void judge(const char *what)
{
    if (errno == ECONNREFUSED)
        errx(1, "nobody listens there, or not any more");
    if (errno != EINTR && errno != EAGAIN && errno != ENOBUFS)
        err(1, "%s", what);
}

static void flush(struct peer *peer)
{
    for (unsigned done = 0; done < peer->waiting;) {
        int sent = sendmmsg(peer->fd, peer->headers + done, peer->waiting - done, 0);
        if (sent < 0)
            judge("sendmmsg");
        else
            done += (unsigned)sent;
    }
    peer->waiting = 0;
}

static void post(struct slot *slot)
{
    struct peer *peer = slot->peer;
    if (peer->waiting == BATCH)
        flush(peer);
    peer->parts[peer->waiting++]
        = (struct iovec){.iov_base = slot->datagram, .iov_len = slot->size};
}

/* ---- Exchanges ------------------------------------------------------------------------------- */

static bool going_on(uint64_t now)
{
    return now < end && !stopped && counted.requests < asked.count;
}

static void ask(struct slot *slot, uint64_t now)
{
    const struct request *request = slot->request;
    slot->token += MOST_WINDOW * multiplier; /* another one, of the same slot */
    slot->message_id = slot->peer->message_id++;
    uint8_t head[4] = {(uint8_t)(0x44 | (asked.non ? NON : CON) << 4), 1 /* GET */,
                       (uint8_t)(slot->message_id >> 8), (uint8_t)slot->message_id};
    memcpy(slot->datagram, head, 4);
    memcpy(slot->datagram + 4, &slot->token, 4);
    memcpy(slot->datagram + 8, request->options, request->size);
    uint8_t *at = slot->datagram + 8 + request->size;
    if (asked.blockwise)
        at = append_block(at, request->last, slot->block);
    slot->size = (size_t)(at - slot->datagram);
    slot->attempts = 1;
    slot->sent = now;
    slot->deadline = now + asked.timeout;
    counted.requests++;
    post(slot);
}

/* Gives a slot the next request, unless the end has come. */
static void employ(struct slot *slot, uint64_t now)
{
    in_flight -= slot->busy;
    slot->busy = going_on(now);
    if (!slot->busy)
        return;
    in_flight++;
    slot->request = &requests[next_line];
    next_line = next_line + 1 == lines ? 0 : next_line + 1;
    slot->block = 0;
    slot->got = 0;
    ask(slot, now);
}

/* Takes an empty message: the answer comes later (ACK), or never (RST). */
static void take_empty(const struct peer *peer, unsigned kind, unsigned id, uint64_t now)
{
    struct slot *slot = slots, *stop = slots + asked.window;
    while (slot < stop && !(slot->busy && slot->peer == peer && slot->message_id == id))
        slot++;
    if (slot == stop || (kind != ACK && kind != RST)) {
        counted.strays++;
    } else if (kind == RST) {
        counted.resets++;
        employ(slot, now);
    } else {
        slot->attempts = ATTEMPTS; /* nothing more to repeat, only to wait */
        slot->deadline = now + (asked.timeout << (ATTEMPTS - 1));
    }
}

/* Takes options and payload of an answer. Returns whether another block is to be asked for. */
static bool take_block(struct slot *slot, const uint8_t *at, const uint8_t *stop, bool good)
{
    struct option option = {0};
    uint32_t block = asked.szx;
    int more;
    while ((more = read_option(&at, stop, &option)) > 0)
        if (option.number == BLOCK2 && option.size <= 3) {
            block = 0;
            for (size_t i = 0; i < option.size; i++)
                block = block << 8 | option.value[i];
        }
    if (more < 0)
        errx(1, "an answer with malformed options");
    slot->got += (size_t)(stop - at);
    counted.payload = slot->got;
    if (!asked.blockwise || !good || !(block & 8)) {
        counted.transfers += good;
        return false;
    }
    if (block >> 4 != slot->block || (block & 7) != asked.szx)
        errx(1, "block %u of szx %u came for block %u", block >> 4, block & 7, slot->block);
    slot->block++;
    return true;
}

static struct slot *slot_of(const struct peer *peer, const uint8_t *token)
{
    uint32_t value;
    memcpy(&value, token, 4);
    struct slot *slot = &slots[value * inverse % MOST_WINDOW];
    return slot->busy && slot->peer == peer && slot->token == value ? slot : NULL;
}

static uint64_t slice_of(uint64_t now)
{
    uint64_t slice = (now - start) * SLICES_PER_S / NS;
    return slice < MOST_SLICES ? slice : MOST_SLICES - 1;
}

static void take(struct peer *peer, const uint8_t *data, size_t size, uint64_t now)
{
    if (size < 4 || data[0] >> 6 != 1 || size < 4u + (data[0] & 15))
        return (void)counted.strays++;
    unsigned kind = data[0] >> 4 & 3, id = data[2] * 256u + data[3];
    if (data[1] == 0)
        return take_empty(peer, kind, id, now);
    if (kind == CON && send(peer->fd, (uint8_t[]){0x40 | ACK << 4, 0, data[2], data[3]}, 4, 0) < 0)
        judge("send");
    struct slot *slot = (data[0] & 15) == 4 ? slot_of(peer, data + 4) : NULL;
    if (!slot || data[1] < 64 || (kind == ACK && id != slot->message_id))
        return (void)counted.strays++;
    latencies_us[counted.answers++] = (float)(now - slot->sent) / 1000;
    counted.codes[data[1]]++;
    slot->answers++;
    last_answer = now;
    counted.slices[slice_of(now)]++;
    if (take_block(slot, data + 8, data + size, data[1] >> 5 == 2) && going_on(now))
        ask(slot, now);
    else
        employ(slot, now);
}

static void receive(struct peer *peer)
{
    static uint8_t data[BATCH][DATAGRAM];
    static struct iovec parts[BATCH];
    static struct mmsghdr headers[BATCH];
    for (unsigned i = 0; i < BATCH; i++) {
        parts[i] = (struct iovec){.iov_base = data[i], .iov_len = DATAGRAM};
        headers[i].msg_hdr = (struct msghdr){.msg_iov = &parts[i], .msg_iovlen = 1};
    }
    int got = recvmmsg(peer->fd, headers, BATCH, MSG_DONTWAIT, NULL);
    if (got < 0)
        judge("recvmmsg");
    uint64_t now = now_ns();
    for (int i = 0; i < got; i++)
        take(peer, data[i], headers[i].msg_len, now);
}

static void repeat(uint64_t now)
{
    static uint64_t looked;
    if (now < looked + LOOK_NS)
        return;
    looked = now;
    for (struct slot *slot = slots; slot < slots + asked.window; slot++) {
        if (!slot->busy || now < slot->deadline)
            continue;
        if (asked.non || slot->attempts == ATTEMPTS) {
            counted.lost++;
            employ(slot, now);
        } else {
            counted.retransmissions++;
            slot->deadline = now + (asked.timeout << slot->attempts++);
            post(slot);
        }
    }
}

static void stop(int)
{
    stopped = 1;
}

static void run(void)
{
    int poll = epoll_create1(EPOLL_CLOEXEC);
    for (struct peer *peer = peers; peer < peers + asked.sockets; peer++)
        if (epoll_ctl(poll, EPOLL_CTL_ADD, peer->fd,
                      &(struct epoll_event){.events = EPOLLIN, .data.ptr = peer}))
            err(1, "epoll");
    signal(SIGTERM, stop);
    start = last_answer = now_ns();
    end = start + asked.duration;
    for (unsigned i = 0; i < asked.window; i++)
        employ(&slots[i], start);
    while (in_flight) {
        for (struct peer *peer = peers; peer < peers + asked.sockets; peer++)
            flush(peer);
        struct epoll_event events[BATCH];
        int ready = epoll_wait(poll, events, BATCH, (int)(LOOK_NS * 1000 / NS));
        for (int i = 0; i < ready; i++)
            receive(events[i].data.ptr);
        repeat(now_ns());
    }
}

/* ---- Telling --------------------------------------------------------------------------------- */

static int ascending(const void *one, const void *other)
{
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

static void tell(void)
{
    unsigned long n = counted.answers;
    double seconds = (double)(last_answer - start) / (double)NS;
    qsort(latencies_us, n, sizeof *latencies_us, ascending);
    printf("{\"requests\": %lu, \"answers\": %lu, \"lost\": %lu, \"retransmissions\": %lu, "
           "\"resets\": %lu, \"strays\": %lu, \"transfers\": %lu, \"payload_bytes\": %zu",
           counted.requests, n, counted.lost, counted.retransmissions, counted.resets,
           counted.strays, counted.transfers, counted.payload);
    printf(", \"started_s\": %.6f, \"seconds\": %.6f, \"per_second\": %.1f, \"cpu_s\": %.6f",
           (double)start / (double)NS, seconds, seconds > 0 ? (double)n / seconds : 0.0,
           (double)clock() / CLOCKS_PER_SEC);
    printf(", \"median_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f",
           n ? latencies_us[n / 2] : 0.0, n ? latencies_us[n * 99 / 100] : 0.0,
           n ? latencies_us[n - 1] : 0.0);
    unsigned long fewest = slots[0].answers, most = 0;
    for (unsigned i = 0; i < asked.window; i++) {
        fewest = slots[i].answers < fewest ? slots[i].answers : fewest;
        most = slots[i].answers > most ? slots[i].answers : most;
    }
    printf(", \"fewest\": %lu, \"most\": %lu, \"by_code\": {", fewest, most);
    const char *comma = "";
    for (unsigned code = 0; code < 256; code++)
        if (counted.codes[code]) {
            printf("%s\"%u.%02u\": %lu", comma, code >> 5, code & 31, counted.codes[code]);
            comma = ", ";
        }
    printf("}, \"slices\": [");
    for (uint64_t i = 0; i <= slice_of(last_answer); i++)
        printf("%s%u", i ? ", " : "", counted.slices[i]);
    printf("]}\n");
}

static double number(const char *text, double low, double high)
{
    char *rest;
    double value = strtod(text, &rest);
    if (rest == text || *rest || !(value >= low && value <= high))
        errx(1, "%s: must be a number from %g to %g", text, low, high);
    return value;
}

int main(int count, char **arguments)
{
    int option;
    while ((option = getopt(count, arguments, "b:nw:s:t:c:r:")) != -1)
        switch (option) {
        case 'b': asked.blockwise = true, asked.szx = (unsigned)number(optarg, 0, 6); break;
        case 'n': asked.non = true; break;
        case 'w': asked.window = (unsigned)number(optarg, 1, MOST_WINDOW); break;
        case 's': asked.sockets = (unsigned)number(optarg, 1, MOST_SOCKETS); break;
        case 't': asked.duration = (uint64_t)(number(optarg, 0.001, MOST_SECONDS) * 1e9); break;
        case 'c': asked.count = (unsigned long)number(optarg, 1, MOST_REQUESTS); break;
        case 'r': asked.timeout = (uint64_t)(number(optarg, 20, 5000) * 1e6); break;
        default: return 2;
        }
    if (count - optind != 3)
        errx(1, "HOST, PORT and FILE are needed");
    srandom((unsigned)now_ns());
    read_requests(arguments[optind + 2]);
    open_peers(arguments[optind], (unsigned)number(arguments[optind + 1], 1, 65535));
    multiplier = (uint32_t)random() | 1;
    for (inverse = 1; inverse * multiplier != 1;)
        inverse *= 2 - inverse * multiplier;
    for (unsigned i = 0; i < asked.window; i++) {
        slots[i].peer = &peers[i % asked.sockets];
        slots[i].token = (i + (uint32_t)random() * MOST_WINDOW) * multiplier;
    }
    run();
    tell();
}
